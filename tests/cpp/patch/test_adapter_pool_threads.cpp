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

constexpr double kTolerance = 1e-5;

// Two versions of one adapter: all weights of the second are those of the first with the other sign.
struct Versions {
  AdapterSpec first;
  AdapterSpec second;
};

Versions two_versions(const std::string& config, const std::string& name) {
  Versions versions{made_of(config, name), made_of(config, name)};
  for (auto& [key, value] : *versions.second.weights) {
    value = -value;
  }
  return versions;
}

at::Tensor alone(const AdapterSpec& spec, const at::Tensor& x) {
  return run_rows(graft(encoder(), {spec}), x, std::vector<int64_t>(static_cast<size_t>(x.size(0)), 0));
}

class AdapterPoolThreads : public ::testing::Test {
 protected:
  static constexpr int64_t kRows = 4;

  AdapterPoolThreads() {
    const std::vector<std::string> configs = {"unipelt", "lora[r=4]", "mam", "lora[r=2]|seq_bn"};
    for (size_t i = 0; i < 2 * configs.size(); ++i) {
      const std::string name = "adapter_" + std::to_string(i);
      adapters_.push_back(two_versions(configs[i % configs.size()], name));
      expected_.push_back({alone(adapters_.back().first, x_)[0], alone(adapters_.back().second, x_)[0]});
    }
    base_ = encoder().forward({x_}).toTensor()[0];
  }

  std::string name_of(size_t adapter) const { return adapters_[adapter].first.name; }

  AdapterSpec load(const std::string& name) {
    const auto number = static_cast<size_t>(std::stoi(name.substr(name.rfind('_') + 1)));
    return loads_.fetch_add(1) % 2 == 0 ? adapters_[number].first : adapters_[number].second;
  }

  // Whether a row is the result for x_ of one version of its adapter: of no mixture, and of no other adapter.
  bool is_right(const at::Tensor& row, int64_t adapter) const {
    if (adapter < 0) {
      return largest_difference(row, base_) < kTolerance;
    }
    const auto& both = expected_[static_cast<size_t>(adapter)];
    return largest_difference(row, both[0]) < kTolerance || largest_difference(row, both[1]) < kTolerance;
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

  const at::Tensor x_ = at::randn({1, 5, 12});
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

TEST_F(AdapterPoolThreads, RequestsBesideReplacingAndEvictingGetWholeAdapters) {
  AdapterPoolOptions options;
  options.capacity = kRows;
  for (const Versions& versions : adapters_) {
    options.room.push_back(versions.first.config);
  }
  AdapterPool pool(encoder(), options, [this](const std::string& name) { return load(name); });
  run_together(
      pool, 4, [&](unsigned seed) { serve(pool, seed, 60); },
      [&](unsigned seed, const std::atomic<bool>& done) { disturb(pool, seed, done); });
  EXPECT_EQ(served_, 4 * 60);
  EXPECT_EQ(wrong_, 0);
  EXPECT_EQ(changed_, 0);
  EXPECT_GT(pool.stats().evictions, 50);
  EXPECT_EQ(pool.stats().rebuilds, 0);
}

TEST_F(AdapterPoolThreads, RequestsWhileBanksGrowGetWholeAdapters) {
  AdapterPoolOptions options;
  options.capacity = kRows;
  options.room = {adapters_[1].first.config};  // the smallest LoRA: each other method is a rebuild
  AdapterPool pool(encoder(), options, [this](const std::string& name) { return load(name); });
  run_together(
      pool, 3, [&](unsigned seed) { serve(pool, seed, 30); },
      [&](unsigned seed, const std::atomic<bool>& done) { disturb(pool, seed, done); });
  EXPECT_EQ(served_, 3 * 30);
  EXPECT_EQ(wrong_, 0);
  EXPECT_EQ(changed_, 0);
  EXPECT_GE(pool.stats().rebuilds, 2);
}

}  // namespace
}  // namespace torchgraft
