#include "adapter_folder.h"

#include <torchgraft/patch/compose.h>

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <map>
#include <random>
#include <thread>

// Compositions in an AdapterPool: each row against that of a module with compose().
namespace torchgraft {
namespace {

using testing::encoder;
using testing::error_of;
using testing::largest_difference;
using testing::made_of;
using testing::run_rows;

constexpr double kTolerance = 1e-5;

const std::map<std::string, std::string> kConfigs = {{"a", "seq_bn[reduction_factor=4]"},
                                                     {"b", "seq_bn[reduction_factor=2]"},
                                                     {"c", "double_seq_bn[use_gating=True]"},
                                                     {"d", "par_bn"},
                                                     {"l", "lora[r=4]"},
                                                     {"m", "lora[r=2, alpha=3, use_gating=True]"},
                                                     {"p", "prefix_tuning[prefix_length=3]"},
                                                     {"q", "prefix_tuning[prefix_length=2, use_gating=True]"},
                                                     {"i", "ia3"},
                                                     {"r", "loreft[r=2]|seq_bn"},
                                                     {"u", "unipelt"}};

AdapterSpec spec_of(const std::string& name) { return made_of(kConfigs.at(name), name); }

AdapterPool::Loader loader() {
  return [](const std::string& name) { return spec_of(name); };
}

AdapterPoolOptions options_for(int64_t capacity, int64_t max_compositions = 32) {
  AdapterPoolOptions options;
  options.capacity = capacity;
  options.max_compositions = max_compositions;
  return options;
}

// A module with these adapters and compositions; ids follow their order.
torch::jit::Module composed(const std::vector<AdapterSpec>& specs, const std::vector<std::string>& texts,
                            const torch::jit::Module& base = encoder()) {
  torch::jit::Module module = graft(base, specs);
  for (size_t i = 0; i < texts.size(); ++i) {
    module = compose(module, "composition " + std::to_string(i), composition_from_string(texts[i]), {.verify = false});
  }
  return module;
}

at::Tensor run(const AdapterPool::Lease& lease, const at::Tensor& x) {
  return run_rows(lease.module(), x, lease.ids());
}

// Rows of one composition alone, in a module of its own.
at::Tensor alone(const std::string& text, const at::Tensor& x) {
  std::vector<AdapterSpec> specs;
  for (const std::string& name : adapters_in(composition_from_string(text))) {
    specs.push_back(spec_of(name));
  }
  return run_rows(composed(specs, {text}), x,
                  std::vector<int64_t>(static_cast<size_t>(x.size(0)), static_cast<int64_t>(specs.size())));
}

void expect_alone(AdapterPool& pool, const std::string& text, const std::string& name = "") {
  const at::Tensor x = at::randn({3, 7, 12});
  const auto lease = pool.acquire(std::vector<std::string>(3, name.empty() ? text : name));
  EXPECT_LT(largest_difference(run(lease, x), alone(text, x)), kTolerance) << text;
}

TEST(PoolCompositions, RowsOfMixedBatchesAreThoseOfAModuleWithThem) {
  const std::vector<std::string> texts = {"Stack(a, b)",
                                          "Stack(a, c)",
                                          "Average(a, b, weights=[0.3,0.7])",
                                          "Stack(l, m)",
                                          "Stack(p, q)",
                                          "Stack(a, l, q)",
                                          "Stack(r, a)",
                                          "Stack(b, Average(a, b))",
                                          "Split(a, b, splits=[3,4])"};
  std::vector<AdapterSpec> specs;
  std::vector<std::string> names;
  for (const auto& [name, config] : kConfigs) {
    specs.push_back(spec_of(name));
    names.push_back(name);
  }
  const torch::jit::Module everything = composed(specs, texts);
  names.insert(names.end(), texts.begin(), texts.end());
  AdapterPool pool(encoder(), options_for(static_cast<int64_t>(specs.size())), loader());
  std::mt19937 random(0);
  for (int batch = 0; batch < 8; ++batch) {
    std::vector<int64_t> ids;
    std::vector<std::string> rows;
    for (int row = 0; row < 12; ++row) {
      ids.push_back(std::uniform_int_distribution<int64_t>(-1, static_cast<int64_t>(names.size()) - 1)(random));
      rows.push_back(ids.back() < 0 ? "" : names[static_cast<size_t>(ids.back())]);
    }
    const at::Tensor x = at::randn({12, 7, 12});
    const auto lease = pool.acquire(rows);
    const at::Tensor expected = run_rows(everything, x, ids);
    const at::Tensor got = run(lease, x);
    for (int64_t row = 0; row < 12; ++row) {
      EXPECT_LT(largest_difference(got[row], expected[row]), kTolerance)
          << "batch " << batch << ", " << rows[static_cast<size_t>(row)];
    }
  }
  EXPECT_EQ(pool.stats().compositions, static_cast<int64_t>(texts.size()));
  EXPECT_EQ(pool.stats().evictions, 0);
}

TEST(PoolCompositions, ABatchSplitSplitsItsOwnRows) {
  AdapterPool pool(encoder(), options_for(4), loader());
  const at::Tensor x = at::randn({5, 7, 12});
  const std::string text = "BatchSplit(a, b, batch_sizes=[1,2])";
  const auto lease = pool.acquire({text, "a", text, "", text});
  const at::Tensor got = run(lease, x).index_select(0, at::tensor({0, 2, 4}));
  EXPECT_LT(largest_difference(got, alone(text, x.index_select(0, at::tensor({0, 2, 4})))), kTolerance);
  const auto wrong = pool.acquire({text, text});
  std::string error;
  try {
    run(wrong, x.narrow(0, 0, 2));
  } catch (const std::exception& thrown) {  // of TorchScript
    error = thrown.what();
  }
  EXPECT_NE(error.find("'BatchSplit(0, 1, batch_sizes=[1,2])': the given batch has a size of 2 which is not equal"),
            std::string::npos)
      << error;
}

TEST(PoolCompositions, GatesGoByCompositionAndAdapter) {
  AdapterPool pool(encoder(), options_for(4), loader());
  const at::Tensor x = at::randn({4, 7, 12});
  const torch::jit::Module module = composed({spec_of("u"), spec_of("c")}, {"Stack(u, c)", "Stack(c, u)"});
  const auto gates_of = [&](const torch::jit::Module& which, const std::vector<int64_t>& ids) {
    at::NoGradGuard no_grad;
    const auto result =
        which.get_method("forward_with_gates")({x}, {{"adapter_ids", at::tensor(ids, at::kLong)}}).toTuple();
    return result->elements()[1].toGenericDict();
  };
  const auto expected = gates_of(module, {2, 1, 3, -1});
  const auto lease = pool.acquire({"Stack(u,c)", "c", "Stack(c, u)", ""});
  const auto got = gates_of(lease.module(), lease.ids());
  ASSERT_EQ(got.size(), 5U);
  ASSERT_EQ(expected.size(), 5U);
  const std::map<std::string, std::string> texts = {{"composition 0", "Stack(u, c)"}, {"composition 1", "Stack(c, u)"}};
  for (const auto& entry : expected) {
    const auto layers = entry.value().toGenericDict();
    std::string key = entry.key().toStringRef();
    if (const size_t dot = key.find('.'); dot != std::string::npos) {
      key = texts.at(key.substr(0, dot)) + key.substr(dot);
    }
    const auto own = got.at(key).toGenericDict();
    ASSERT_EQ(own.size(), layers.size());
    for (const auto& layer : layers) {
      for (const auto& location : layer.value().toGenericDict()) {
        const at::Tensor gate = own.at(layer.key()).toGenericDict().at(location.key()).toTensor();
        EXPECT_LT(largest_difference(gate, location.value().toTensor()), kTolerance) << entry.key();
      }
    }
  }
}

TEST(PoolCompositions, PartsAreEvictedReplacedAndComeBack) {
  AdapterPool pool(encoder(), options_for(2), loader());
  expect_alone(pool, "Stack(a, b)");
  const at::Tensor x = at::randn({1, 7, 12});
  const auto held = pool.acquire({"Stack(a, b)"});
  const at::Tensor before = run(held, x);
  expect_alone(pool, "Average(a, b)");
  EXPECT_EQ(pool.resident(), (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(at::equal(run(held, x), before));
  {
    const auto gone = std::move(const_cast<AdapterPool::Lease&>(held));
  }
  expect_alone(pool, "Stack(l, m)");  // a and b leave
  expect_alone(pool, "Stack(a, b)");
  EXPECT_GE(pool.stats().evictions, 4);
  pool.insert(made_of(kConfigs.at("b"), "b", /*seed=*/7));
  const torch::jit::Module other = composed({spec_of("a"), made_of(kConfigs.at("b"), "b", 7)}, {"Stack(a, b)"});
  EXPECT_LT(largest_difference(run(pool.acquire({"Stack(a, b)"}), x), run_rows(other, x, {2})), kTolerance);
  pool.insert(made_of(kConfigs.at("l"), "b"));  // of another kind: another structure
  const torch::jit::Module kind = composed({spec_of("a"), made_of(kConfigs.at("l"), "b")}, {"Stack(a, b)"});
  EXPECT_LT(largest_difference(run(pool.acquire({"Stack(a, b)"}), x), run_rows(kind, x, {2})), kTolerance);
}

TEST(PoolCompositions, OneStructureServesManyWithoutAnotherBuild) {
  AdapterPool pool(encoder(), options_for(3, 1), loader());
  pool.acquire({"b"});  // the larger bottleneck, so that no bank has to grow later
  expect_alone(pool, "Stack(a, b)");
  const int64_t rebuilds = pool.stats().rebuilds;
  expect_alone(pool, "Stack(b, a)");
  expect_alone(pool, "Stack(a, b)");
  EXPECT_EQ(pool.stats().rebuilds, rebuilds);
  expect_alone(pool, "Average(a, b)");  // takes the place of the other
  EXPECT_EQ(pool.stats().rebuilds, rebuilds + 1);
  EXPECT_EQ(pool.stats().compositions, 1);
  EXPECT_EQ(error_of([&] { pool.acquire({"Stack(a, b)", "Stack(b, a)"}); }),
            "AdapterPool: no room for 'Stack(b, a)': all 1 compositions are asked for in the same call; raise "
            "max_compositions, or ask for fewer at once");
  expect_alone(pool, "Stack(a, b)");
}

TEST(PoolCompositions, NamesOfCompositionsAreGivenAndTaken) {
  AdapterPool pool(encoder(), options_for(3), loader());
  pool.compose("both", composition_from_string("Stack(a, b)"));
  expect_alone(pool, "Stack(a, b)", "both");
  pool.compose("both", composition_from_string("Average(a, b)"));
  expect_alone(pool, "Average(a, b)", "both");
  EXPECT_EQ(pool.compositions(), (std::map<std::string, std::string>{{"both", "Average(a, b)"}}));
  EXPECT_EQ(error_of([&] { pool.compose("c", composition_from_string("Stack(both, a)")); }),
            "AdapterPool: 'c', Stack(both, a), uses 'both', which is a composition; name its adapters");
  EXPECT_EQ(error_of([&] { pool.acquire({"Stack(both, a)"}); }),
            "AdapterPool: Stack(both, a) uses 'both', which is a composition; name its adapters");
  EXPECT_EQ(error_of([&] { pool.compose("a", composition_from_string("Stack(b, c)")); }),
            "AdapterPool: an adapter is called 'a'; evict it first, or give the composition another name");
  EXPECT_EQ(error_of([&] { pool.insert(made_of("lora", "both")); }),
            "AdapterPool: a composition is called 'both'; remove it first (remove_composition), or give the adapter "
            "another name");
  EXPECT_TRUE(pool.remove_composition("both"));
  EXPECT_FALSE(pool.remove_composition("both"));
  const torch::jit::Module module = composed({spec_of("a"), spec_of("b")}, {"Stack(a, b)"});
  AdapterPool grown(module, options_for(3));
  expect_alone(grown, "Stack(a, b)");
  expect_alone(grown, "Stack(b, a)");
}

TEST(PoolCompositions, LimitsAndRefusalsNameTheRemedy) {
  AdapterPoolOptions few = options_for(4);
  few.max_composition_parts = 3;
  few.max_composition_depth = 2;
  AdapterPool pool(encoder(), few, loader());
  const auto refusal = [&](const std::string& text) { return error_of([&] { pool.acquire({text}); }); };
  EXPECT_EQ(refusal("Stack(a, b, a, b)"),
            "AdapterPool: 'Stack(a, b, a, b)': expected at most 3 adapters in a composition, got 4; raise "
            "max_composition_parts");
  EXPECT_EQ(refusal("Stack(a, Average(b, Stack(a)))").substr(0, 60),
            std::string("AdapterPool: 'Stack(a, Average(b, Stack(a)))': expected at most 2 blocks").substr(0, 60));
  EXPECT_EQ(
      refusal("Fuse(a, b)"),
      "AdapterPool: 'Fuse(a, b)': Fuse(a, b) needs AdapterFusion layers, which no pool holds yet; serve it from a "
      "module of its own (compose)");
  EXPECT_EQ(
      refusal("Parallel(a, b)"),
      "AdapterPool: 'Parallel(a, b)': no pool holds a Parallel; acquire each of its parts, and repeat the rows for "
      "each (a module's own: remove_adapter takes it out)");
  EXPECT_EQ(refusal("Stack(a, MultiTask(b, c))"),
            "AdapterPool: 'Stack(a, MultiTask(b, c))': no pool holds a MultiTask; acquire for each row the part of its "
            "task (a module's own: remove_adapter takes it out)");
  EXPECT_NE(refusal("Stack(a, ").find("composition: expected"), std::string::npos);
  EXPECT_NE(refusal("Average(l, p)").find("compose: 'Average(l, p)': "), std::string::npos) << refusal("Average(l, p)");
  EXPECT_EQ(refusal("Split(l, m, splits=[3,4])"),
            "compose: 'Split(l, m, splits=[3,4])': the adapters library has Split for bottlenecks only, and 'l' has "
            "another method, at selfattn_lora_q of layer 0");
  expect_alone(pool, "Stack(a, b)");  // the pool stays usable
  AdapterPool none(encoder(), options_for(4, 0), loader());
  EXPECT_EQ(error_of([&] { none.acquire({"Stack(a, b)"}); }),
            "AdapterPool: 'Stack(a, b)' is a composition, of which this pool holds none; raise max_compositions");
}

// Threads that compose, load, replace and evict at the same time, with more adapters and compositions than there is
// room for: every row is that of whole versions of its adapters.
class PoolCompositionThreads : public ::testing::Test {
 protected:
  PoolCompositionThreads() {
    for (const std::string& text : texts_) {
      const auto names = adapters_in(composition_from_string(text));
      for (uint64_t versions = 0; versions < 4; ++versions) {
        const torch::jit::Module module =
            composed({version(names[0], versions % 2), version(names[1], versions / 2)}, {text}, base_);
        expected_[text].push_back(run_rows(module, x_, {2})[0]);
      }
    }
  }

  static torch::jit::Module double_encoder() {
    torch::jit::Module module = encoder();
    module.to(at::kDouble);
    return module;
  }

  static AdapterSpec version(const std::string& name, uint64_t number) {
    AdapterSpec spec = made_of(name == "s" || name == "t" ? "lora[r=4]" : "seq_bn[reduction_factor=4]", name, number);
    for (auto& [key, value] : *spec.weights) {
      value = value.to(at::kDouble);
    }
    return spec;
  }

  bool is_right(const at::Tensor& row, const std::string& text) const {
    return std::any_of(expected_.at(text).begin(), expected_.at(text).end(),
                       [&](const at::Tensor& right) { return largest_difference(row, right) < 1e-12; });
  }

  void serve(AdapterPool& pool, unsigned seed) {
    std::mt19937 random(seed);
    for (int batch = 0; batch < 20; ++batch) {
      const std::string first = texts_[random() % texts_.size()];
      const std::string second = texts_[random() % texts_.size()];
      const auto lease = pool.acquire({first, second});
      const at::Tensor x = x_.expand({2, -1, -1});
      const at::Tensor y = run_rows(lease.module(), x, lease.ids());
      changed_ += !at::equal(y, run_rows(lease.module(), x, lease.ids()));
      wrong_ += !is_right(y[0], first) + !is_right(y[1], second);
    }
  }

  const std::vector<std::string> texts_ = {"Stack(v, w)", "Stack(w, x)", "Average(v, x)", "Stack(s, t)", "Stack(v, s)"};
  const torch::jit::Module base_ = double_encoder();
  const at::Tensor x_ = at::randn({1, 5, 12}).to(at::kDouble);
  std::map<std::string, std::vector<at::Tensor>> expected_;
  std::atomic<int> loads_{0};
  std::atomic<int> wrong_{0};
  std::atomic<int> changed_{0};
};

TEST_F(PoolCompositionThreads, RowsAreThoseOfWholeVersions) {
  AdapterPoolOptions options = options_for(4, 3);
  options.room = {version("v", 0).config, version("s", 0).config};
  AdapterPool pool(base_, options,
                   [this](const std::string& name) { return version(name, static_cast<uint64_t>(loads_++ % 2)); });
  std::atomic<bool> done{false};
  std::thread disturbing([&] {
    std::mt19937 random(100);
    while (!done) {
      const std::string name(1, "vwxst"[random() % 5]);
      if (random() % 2 == 0) {
        pool.insert(version(name, random() % 2));
      } else {
        pool.evict(name);
      }
    }
  });
  std::vector<std::thread> serving;
  for (unsigned i = 0; i < 3; ++i) {
    serving.emplace_back([&, i] {
      at::set_num_threads(1);
      serve(pool, i);
    });
  }
  for (std::thread& thread : serving) {
    thread.join();
  }
  done = true;
  disturbing.join();
  EXPECT_EQ(wrong_, 0);
  EXPECT_EQ(changed_, 0);
  EXPECT_GT(pool.stats().evictions, 10);
}

}  // namespace
}  // namespace torchgraft
