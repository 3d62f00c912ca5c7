#include "adapter_folder.h"

#include <ATen/Parallel.h>
#include <torchgraft/patch/adapter_pool.h>

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <random>
#include <thread>

// Threads that serve, load, replace and evict at the same time, with more adapters than rows. Also run by hand under
// ThreadSanitizer (cmake --preset tsan; docs/serving.md).
namespace torchgraft {
namespace {

using testing::AdapterFolder;
using testing::encoder;
using testing::largest_difference;
using testing::made_of;
using testing::run_rows;

// float32 runs the fused kernels. float64 leaves next to no rounding, so that no mixture, however slight, passes.
struct Numbers {
  at::ScalarType dtype;
  double tolerance;
};

// Two versions of one adapter, whose weights are drawn by themselves.
struct Versions {
  AdapterSpec first;
  AdapterSpec second;
};

Versions two_versions(const std::string& config, const std::string& name, at::ScalarType dtype) {
  Versions versions{made_of(config, name, /*seed=*/1), made_of(config, name, /*seed=*/2)};
  for (AdapterSpec* version : {&versions.first, &versions.second}) {
    for (auto& [key, value] : *version->weights) {
      value = value.to(dtype);
    }
  }
  return versions;
}

torch::jit::Module encoder_of(at::ScalarType dtype) {
  torch::jit::Module module = encoder();
  module.to(dtype);
  return module;
}

class AdapterPoolThreads : public ::testing::TestWithParam<Numbers> {
 protected:
  static constexpr int64_t kRows = 4;

  AdapterPoolThreads() {
    const std::vector<std::string> configs = {"unipelt", "lora[r=4]", "mam", "lora[r=2]|seq_bn", "noreft"};
    for (size_t i = 0; i < 2 * configs.size(); ++i) {
      const std::string name = "adapter_" + std::to_string(i);
      adapters_.push_back(two_versions(configs[i % configs.size()], name, GetParam().dtype));
      expected_.push_back({alone(adapters_.back().first), alone(adapters_.back().second)});
    }
    base_ = base().forward({x_}).toTensor()[0];
    check_results_differ();
  }

  torch::jit::Module base() const { return encoder_of(GetParam().dtype); }

  // The result for x_ of a module with this adapter alone. Rounding has to stay far below the tolerance: were it near,
  // an unlucky draw of x_ would look like a wrong row.
  at::Tensor alone(AdapterSpec spec) const {
    const at::Tensor result = run_rows(graft(base(), {spec}), x_, {0})[0];
    for (auto& [key, value] : *spec.weights) {
      value = value.to(at::kDouble);
    }
    const at::Tensor exact = run_rows(graft(encoder_of(at::kDouble), {spec}), x_.to(at::kDouble), {0})[0];
    EXPECT_LT(largest_difference(result, exact), GetParam().tolerance / 4) << spec.name << ": draw another x_";
    return result;
  }

  void check_results_differ() const {
    std::vector<at::Tensor> results = {base_};
    for (const auto& both : expected_) {
      results.insert(results.end(), both.begin(), both.end());
    }
    for (size_t i = 0; i < results.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        EXPECT_GT(largest_difference(results[i], results[j]), 0.1) << "results " << i << " and " << j;
      }
    }
  }

  std::string name_of(size_t adapter) const { return adapters_[adapter].first.name; }

  AdapterSpec load(const std::string& name) {
    const auto number = static_cast<size_t>(std::stoi(name.substr(name.rfind('_') + 1)));
    return loads_.fetch_add(1) % 2 == 0 ? adapters_[number].first : adapters_[number].second;
  }

  // Whether a row is the result for x_ of one version of its adapter: of no mixture, and of no other adapter.
  bool is_right(const at::Tensor& row, int64_t adapter) const {
    if (adapter < 0) {
      return largest_difference(row, base_) < GetParam().tolerance;
    }
    const auto& both = expected_[static_cast<size_t>(adapter)];
    return largest_difference(row, both[0]) < GetParam().tolerance ||
           largest_difference(row, both[1]) < GetParam().tolerance;
  }

  // Runs rows of random adapters and of the base twice under one lease. Counts wrong rows, and batches that changed.
  void serve(AdapterPool& pool, unsigned seed, int batches) {
    std::mt19937 random(seed);
    std::uniform_int_distribution<int64_t> any(-1, static_cast<int64_t>(adapters_.size()) - 1);
    for (int batch = 0; batch < batches; ++batch) {
      std::vector<int64_t> adapters;
      std::vector<std::string> names;
      while (adapters.size() < 3) {
        adapters.push_back(any(random));
        names.push_back(adapters.back() < 0 ? "" : name_of(static_cast<size_t>(adapters.back())));
      }
      const auto lease = pool.acquire(names);
      const at::Tensor x = x_.expand({static_cast<int64_t>(adapters.size()), -1, -1});
      const at::Tensor y = run_rows(lease.module(), x, lease.ids());
      changed_ += !at::equal(y, run_rows(lease.module(), x, lease.ids()));
      for (size_t row = 0; row < adapters.size(); ++row) {
        wrong_ += !is_right(y[static_cast<int64_t>(row)], adapters[row]);
      }
      ++served_;
    }
  }

  // Replaces and evicts until `done`.
  void disturb(AdapterPool& pool, unsigned seed, const std::atomic<bool>& done) {
    std::mt19937 random(seed);
    while (!done) {
      const Versions& versions = adapters_[random() % adapters_.size()];
      switch (random() % 3) {
        case 0:
          pool.insert(versions.first);
          break;
        case 1:
          pool.insert(versions.second);
          break;
        default:
          pool.evict(versions.first.name);
      }
    }
  }

  const at::Tensor x_ = at::randn({1, 5, 12}).to(GetParam().dtype);
  std::vector<Versions> adapters_;
  std::vector<std::array<at::Tensor, 2>> expected_;
  at::Tensor base_;
  std::atomic<int> loads_{0};
  std::atomic<int> wrong_{0};
  std::atomic<int> changed_{0};
  std::atomic<int> served_{0};
};

void run_together(AdapterPool& pool, int servers, const std::function<void(unsigned)>& serve,
                  const std::function<void(unsigned, const std::atomic<bool>&)>& disturb) {
  std::atomic<bool> done{false};
  std::vector<std::thread> disturbing;
  std::vector<std::thread> serving;
  for (unsigned i = 0; i < 2; ++i) {
    disturbing.emplace_back([&, i] { disturb(100 + i, done); });
  }
  for (unsigned i = 0; i < static_cast<unsigned>(servers); ++i) {
    serving.emplace_back([&, i] {
      at::set_num_threads(1);
      serve(i);
    });
  }
  for (std::thread& thread : serving) {
    thread.join();
  }
  done = true;
  for (std::thread& thread : disturbing) {
    thread.join();
  }
}

TEST_P(AdapterPoolThreads, RequestsBesideReplacingAndEvictingGetWholeAdapters) {
  AdapterPoolOptions options;
  options.capacity = kRows;
  for (const Versions& versions : adapters_) {
    options.room.push_back(versions.first.config);
  }
  AdapterPool pool(base(), options, [this](const std::string& name) { return load(name); });
  run_together(
      pool, 4, [&](unsigned seed) { serve(pool, seed, 60); },
      [&](unsigned seed, const std::atomic<bool>& done) { disturb(pool, seed, done); });
  EXPECT_EQ(served_, 4 * 60);
  EXPECT_EQ(wrong_, 0);
  EXPECT_EQ(changed_, 0);
  EXPECT_GT(pool.stats().evictions, 50);
  EXPECT_EQ(pool.stats().rebuilds, 0);
}

TEST_P(AdapterPoolThreads, RequestsWhileBanksGrowGetWholeAdapters) {
  AdapterPoolOptions options;
  options.capacity = kRows;
  options.room = {adapters_[1].first.config};  // the smallest LoRA: each other method is a rebuild
  AdapterPool pool(base(), options, [this](const std::string& name) { return load(name); });
  run_together(
      pool, 3, [&](unsigned seed) { serve(pool, seed, 30); },
      [&](unsigned seed, const std::atomic<bool>& done) { disturb(pool, seed, done); });
  EXPECT_EQ(served_, 3 * 30);
  EXPECT_EQ(wrong_, 0);
  EXPECT_EQ(changed_, 0);
  EXPECT_GE(pool.stats().rebuilds, 2);
}

INSTANTIATE_TEST_SUITE_P(Of, AdapterPoolThreads,
                         ::testing::Values(Numbers{at::kFloat, 1e-5}, Numbers{at::kDouble, 1e-12}),
                         [](const auto& test) { return std::string(c10::toString(test.param.dtype)); });

}  // namespace
}  // namespace torchgraft
