#include "adapter_folder.h"

#include <torchgraft/patch/check_room.h>
#include <torchgraft/patch/compose.h>
#include <torchgraft/patch/head.h>
#include <torchgraft/patch/life.h>
#include <torchgraft/patch/read_adapter.h>
#include <torchgraft/patch/train.h>

#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <new>
#include <random>

namespace torchgraft {
namespace {

using testing::AdapterFolder;
using testing::encoder;
using testing::error_of;
using testing::largest_difference;
using testing::made_of;
using testing::run_rows;

constexpr double kTolerance = 1e-5;

at::Tensor run(const AdapterPool::Lease& lease, const at::Tensor& x) {
  return run_rows(lease.module(), x, lease.ids());
}

// The result for x of a module with this adapter alone.
at::Tensor alone(const AdapterSpec& spec, const at::Tensor& x) {
  torch::jit::Module module = graft(encoder(), {spec});
  at::NoGradGuard no_grad;
  return module.forward({x}).toTensor();
}

AdapterPoolOptions options(int64_t capacity, const std::vector<std::string>& room) {
  AdapterPoolOptions result;
  result.capacity = capacity;
  for (const std::string& config : room) {
    result.room.push_back(config_from_string(config));
  }
  return result;
}

// While it lives, every allocation for a tensor after the next `count` ones fails.
class LittleMemory : public c10::Allocator {
 public:
  explicit LittleMemory(int64_t count) : left_(count) { c10::SetCPUAllocator(this); }
  LittleMemory(const LittleMemory&) = delete;
  LittleMemory& operator=(const LittleMemory&) = delete;
  ~LittleMemory() override { c10::SetCPUAllocator(real_); }

  c10::DataPtr allocate(size_t bytes) override {
    if (--left_ < 0) {
      throw std::bad_alloc();
    }
    return real_->allocate(bytes);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { real_->copy_data(to, from, bytes); }

 private:
  c10::Allocator* const real_ = c10::GetCPUAllocator();
  int64_t left_;
};

TEST(AdapterPool, RoomThatCannotBeMadeIsNamedBeforeThePoolIs) {
  AdapterPoolOptions given =
      options(2, {"lora[r=4]", "lora[r=1048576]", "seq_bn[mh_adapter=False, output_adapter=False, cross_adapter=True]",
                  "lora[leave_out=[0, 1, 2, 3]]", "unipelt", "lora[r=400]", "lora[use_dora=True, r=2]", "lora[r=2]",
                  "seq_bn[original_ln_after=False, ln_before=True]"});
  given.max_row_bytes = 100'000;
  const std::vector<std::string> faults = check_room(encoder(), given);
  const std::vector<std::string> expected = {
      "", "rows for these need", "asks for nothing", "asks for nothing", "", "rows for these need", "", "", ""};
  ASSERT_EQ(faults.size(), expected.size());
  std::vector<AdapterConfig> fitting;
  for (size_t i = 0; i < faults.size(); ++i) {
    EXPECT_EQ(faults[i].empty(), expected[i].empty()) << faults[i];
    EXPECT_NE(faults[i].find(expected[i]), std::string::npos) << faults[i];
    if (faults[i].empty()) {
      fitting.push_back(given.room[i]);
    }
  }
  // What it lets through fits, and it counts as the pool does.
  given.room = fitting;
  const int64_t bytes = AdapterPool(encoder(), given).stats().row_bytes;
  given.max_row_bytes = bytes;
  EXPECT_EQ(check_room(encoder(), given), std::vector<std::string>(fitting.size()));
  given.max_row_bytes = bytes - 1;
  EXPECT_FALSE(check_room(encoder(), given).back().empty());
}

TEST(AdapterPool, InsertRewritesRowsInPlace) {
  AdapterPool pool(encoder(), options(2, {"unipelt"}));
  const at::Tensor x = at::randn({1, 5, 12});
  const auto* first = pool.acquire({""}).module()._ivalue().get();
  for (const char* name : {"a", "b", "c", "d"}) {
    const AdapterSpec spec = made_of("unipelt", name);
    pool.insert(spec);
    const auto lease = pool.acquire({name});
    EXPECT_EQ(lease.module()._ivalue().get(), first);
    EXPECT_LT(largest_difference(run(lease, x), alone(spec, x)), kTolerance) << name;
  }
  EXPECT_EQ(pool.resident(), (std::vector<std::string>{"c", "d"}));
  EXPECT_EQ(pool.stats().rebuilds, 0);
  EXPECT_EQ(pool.stats().evictions, 2);
}

TEST(AdapterPool, InsertIntoAFullPoolEvictsTheLeastRecentlyUsed) {
  AdapterPool pool(encoder(), options(3, {"lora"}));
  for (const char* name : {"a", "b", "c"}) {
    pool.insert(made_of("lora", name));
  }
  pool.acquire({"a"});
  pool.insert(made_of("lora", "d"));
  EXPECT_EQ(pool.resident(), (std::vector<std::string>{"a", "c", "d"}));
}

TEST(AdapterPool, LeasesKeepAdaptersThatAreReplacedOrEvicted) {
  AdapterPool pool(encoder(), options(2, {"lora"}));
  const at::Tensor x = at::randn({1, 5, 12});
  const AdapterSpec before = made_of("lora", "a", /*seed=*/1);
  const AdapterSpec after = made_of("lora", "a", /*seed=*/2);
  pool.insert(before);
  const auto old = pool.acquire({"a"});
  pool.insert(after);
  const auto renewed = pool.acquire({"a"});
  EXPECT_LT(largest_difference(run(old, x), alone(before, x)), kTolerance);
  EXPECT_LT(largest_difference(run(renewed, x), alone(after, x)), kTolerance);
  EXPECT_GT(largest_difference(run(old, x), run(renewed, x)), 1e-2);

  EXPECT_TRUE(pool.evict("a"));
  EXPECT_FALSE(pool.evict("a"));
  EXPECT_FALSE(pool.try_acquire({"a"}).has_value());
  EXPECT_LT(largest_difference(run(renewed, x), alone(after, x)), kTolerance);
}

TEST(AdapterPool, WaitingForRowsOfOthersHasAnEnd) {
  AdapterPoolOptions given = options(1, {"lora"});
  given.longest_wait = std::chrono::milliseconds(20);
  const AdapterSpec other = made_of("lora", "b");
  AdapterPool pool(encoder(), given, [&](const std::string&) { return other; });
  pool.insert(made_of("lora", "a"));
  const at::Tensor x = at::randn({1, 5, 12});
  {
    const auto held = pool.acquire({"a"});
    EXPECT_THROW(pool.acquire({"b"}), RowsInUse);
    EXPECT_THROW(pool.insert(other), RowsInUse);
    EXPECT_NE(error_of([&] { pool.acquire({"b"}); }).find("no place for 'b': others have held all 1 rows for 20 ms"),
              std::string::npos);
  }
  EXPECT_LT(largest_difference(run(pool.acquire({"b"}), x), alone(other, x)), kTolerance);
}

TEST(AdapterPool, RewrittenRowsKeepNothingOfEarlierAdapters) {
  AdapterPool pool(encoder(), options(1, {"lora[r=8]|prefix_tuning[prefix_length=6]", "mam", "unipelt"}));
  const at::Tensor x = at::randn({1, 5, 12});
  for (const char* config : {"unipelt", "lora[r=2]", "mam", "prefix_tuning[prefix_length=2, flat=True]",
                             "lora[r=8]|prefix_tuning[prefix_length=6]", "unipelt"}) {
    const AdapterSpec spec = made_of(config, "a");
    pool.insert(spec);
    EXPECT_EQ(pool.stats().rebuilds, 0) << config;
    EXPECT_LT(largest_difference(run(pool.acquire({"a"}), x), alone(spec, x)), kTolerance) << config;
  }
}

TEST(AdapterPool, TrainableAdaptersOfTheModuleAreServedWithTheirPresentWeights) {
  const at::Tensor x = at::randn({1, 5, 12});
  for (const char* config : {"lora[use_dora=True, init_weights='bert']", "mam", "compacter++[reduction_factor=3]"}) {
    auto module = graft(encoder(), {{"own", config_from_string(config), std::nullopt, "", /*trainable=*/true}});
    {
      at::NoGradGuard no_grad;
      for (const auto& [name, parameter] : trainable_parameters(module, "own")) {
        parameter.add_(0.1 * at::rand_like(parameter));
      }
    }
    AdapterPool pool(module, options(2, {}));
    const at::Tensor expected = module.forward({x}).toTensor();
    EXPECT_LT(largest_difference(run(pool.acquire({"own"}), x), expected), kTolerance) << config;
  }
}

TEST(AdapterPool, LargerAdaptersGrowTheBanksBesideALease) {
  AdapterPool pool(encoder(), options(4, {"lora[r=2]"}));
  const at::Tensor x = at::randn({1, 5, 12});
  const AdapterSpec small = made_of("lora[r=2]", "small");
  pool.insert(small);
  const auto old = pool.acquire({"small"});
  const std::vector<AdapterSpec> larger = {made_of("lora[r=16]", "rank"), made_of("mam", "method"),
                                           made_of("lora[use_dora=True]", "dora")};
  for (const AdapterSpec& spec : larger) {
    pool.insert(spec);
  }
  EXPECT_EQ(pool.stats().rebuilds, 3);
  const auto mixed = pool.acquire({"method", "", "small", "dora", "rank", "small"});
  EXPECT_FALSE(mixed.same_module(old));
  const at::Tensor together = run(mixed, x.expand({6, -1, -1}));
  EXPECT_LT(largest_difference(run(old, x)[0], together[2]), kTolerance);
  EXPECT_LT(largest_difference(alone(larger[1], x)[0], together[0]), kTolerance);
  EXPECT_LT(largest_difference(alone(larger[2], x)[0], together[3]), kTolerance);
  EXPECT_LT(largest_difference(alone(larger[0], x)[0], together[4]), kTolerance);
  EXPECT_LT(largest_difference(encoder().forward({x}).toTensor()[0], together[1]), kTolerance);
}

TEST(AdapterPool, GatesAreReportedByAdapterName) {
  AdapterPool pool(encoder(), options(3, {"unipelt", "lora"}));
  pool.insert(made_of("lora", "plain"));
  pool.insert(made_of("unipelt", "gated"));
  const auto lease = pool.acquire({"gated", "plain", "gated"});
  const auto ids = at::tensor(lease.ids(), at::kLong);
  at::NoGradGuard no_grad;
  const auto pair =
      lease.module().get_method("forward_with_gates")({at::randn({3, 5, 12})}, {{"adapter_ids", ids}}).toTuple();
  const auto gates = pair->elements()[1].toGenericDict();
  EXPECT_EQ(gates.at("gated").toGenericDict().at(1).toGenericDict().at("selfattn_lora").toTensor().sizes(),
            (std::vector<int64_t>{2, 2}));
  EXPECT_EQ(gates.at("plain").toGenericDict().size(), 0u);
}

TEST(AdapterPool, LeasesComputeLogitsAsForwardWithHeadDoes) {
  for (const char* json : {R"({"config": {"head_type": "classification", "num_labels": 3, "layers": 2,
                                          "activation_function": "tanh"}, "pooling": "mean"})",
                           R"({"config": {"head_type": "classification", "num_labels": 1, "layers": 1,
                                          "activation_function": null}, "pooling": "last"})",
                           R"({"config": {"head_type": "tagging", "num_labels": 5, "layers": 1,
                                          "activation_function": "tanh"}})"}) {
    const auto plain = graft(encoder(), {made_of("unipelt", "a")});
    const auto reference = add_head(plain, "a", head_config_from_json(json));
    const AdapterFiles files = adapter_files(reference, "a");
    AdapterSpec spec{"a", config_from_json(files.config), files.weights, "a"};
    spec.head = HeadSpec{head_config_from_json(files.head_config), files.head_weights, "a"};
    AdapterPool pool(encoder(), options(2, {"lora"}));
    pool.insert(made_of("lora", "headless"));
    pool.insert(spec);  // larger banks
    const auto lease = pool.acquire({"headless", "a"});
    ASSERT_EQ(lease.head(0), nullptr);
    ASSERT_NE(lease.head(1), nullptr);
    const at::Tensor x = at::randn({3, 5, 12});
    at::NoGradGuard no_grad;
    const at::Tensor states = run_rows(lease.module(), x, std::vector<int64_t>(3, lease.ids()[1]));
    const at::Tensor expected = reference.get_method("forward_with_head")({x}).toTensor();
    EXPECT_LT(largest_difference(lease.logits(1, states, {}), expected), kTolerance) << json;
    EXPECT_NE(error_of([&] { lease.logits(0, states, {}); }).find("has no head"), std::string::npos);

    // With a token mask the padding must not count: the logits are those of the shorter rows.
    const at::Tensor mask = at::tensor({1, 1, 1, 0, 0}, at::kLong).expand({3, 5});
    const at::Tensor shorter = lease.logits(1, states.narrow(1, 0, 3), {});
    const at::Tensor masked = lease.logits(1, states, mask);
    EXPECT_LT(largest_difference(masked.dim() == 3 ? masked.narrow(1, 0, 3) : masked, shorter), kTolerance) << json;
  }
}

TEST(AdapterPool, AdaptersOfTheModuleAreNeverEvicted) {
  const AdapterSpec own = made_of("unipelt", "own");
  AdapterPool pool(graft(encoder(), {own}), options(2, {"lora"}));
  const at::Tensor x = at::randn({1, 5, 12});
  for (const char* name : {"a", "b", "c"}) {
    pool.insert(made_of("lora", name));
  }
  EXPECT_EQ(pool.resident(), (std::vector<std::string>{"c", "own"}));
  EXPECT_LT(largest_difference(run(pool.acquire({"own"}), x), alone(own, x)), kTolerance);
  EXPECT_NE(error_of([&] { pool.evict("own"); }).find("came with the module"), std::string::npos);
  EXPECT_NE(error_of([&] { pool.acquire({"c", "z"}); }).find("no adapter 'z' is in memory"), std::string::npos);
  EXPECT_NE(error_of([&] { AdapterPool(graft(encoder(), {own}), options(1, {})); }).find("capacity above that"),
            std::string::npos);
}

TEST(AdapterPool, AdaptersThatCannotBeLoadedChangeNothing) {
  AdapterPool pool(encoder(), options(1, {"lora"}), [](const std::string& name) -> AdapterSpec {
    TORCH_CHECK(name != "missing", "no such file");
    return made_of("lora", name == "other" ? "another" : name);
  });
  AdapterSpec wrong = made_of("lora", "a");
  wrong.weights->begin()->second = at::zeros({3, 3});
  pool.acquire({"good"});
  EXPECT_NE(error_of([&] { pool.insert(wrong); }).find("expected"), std::string::npos);
  EXPECT_NE(error_of([&] { pool.acquire({"missing"}); }).find("no such file"), std::string::npos);
  EXPECT_NE(error_of([&] { pool.acquire({"other"}); }).find("the loader gave 'another'"), std::string::npos);
  EXPECT_NE(error_of([&] { pool.acquire({"a", "b"}); }).find("asked for in the same call"), std::string::npos);
  EXPECT_TRUE(pool.try_acquire({"b"}) || pool.try_acquire({"a"}));
  EXPECT_NE(error_of([&] { pool.insert(made_of("lora", "")); }).find("needs a name"), std::string::npos);
}

TEST(AdapterPool, ARowWhoseWritingFailedIsFreeAgain) {
  AdapterPool pool(encoder(), options(1, {"unipelt"}));
  const at::Tensor x = at::randn({1, 5, 12});
  const AdapterSpec spec = made_of("unipelt", "a");
  const AdapterSpec other = made_of("lora", "b");
  const at::Tensor expected = alone(other, x);
  int64_t failures = 0;
  for (bool fails = true; fails; ++failures) {
    try {
      const LittleMemory memory(failures);
      pool.insert(spec);
      fails = false;
    } catch (const std::exception&) {
      EXPECT_FALSE(pool.try_acquire({"a"}).has_value());
    }
    pool.insert(other);
    ASSERT_LT(largest_difference(run(pool.acquire({"b"}), x), expected), kTolerance) << "after " << failures;
  }
  EXPECT_GT(failures, 20);  // each tensor of the row has failed once
}

TEST(AdapterPool, AdaptersAboveMaxRowBytesAreRefused) {
  AdapterPoolOptions limited = options(4, {"lora[r=4]"});
  limited.max_row_bytes = AdapterPool(encoder(), options(4, {"lora[r=8]"})).stats().row_bytes;
  AdapterPool pool(encoder(), limited);
  pool.insert(made_of("lora[r=8]", "fits"));
  EXPECT_NE(error_of([&] { pool.insert(made_of("lora[r=9]", "large")); }).find("adapters of at most"),
            std::string::npos);
  EXPECT_EQ(pool.resident(), std::vector<std::string>{"fits"});
  EXPECT_EQ(pool.stats().row_bytes, limited.max_row_bytes);
  limited.max_row_bytes = 1;
  EXPECT_NE(error_of([&] { AdapterPool(encoder(), limited); }).find("adapters of at most"), std::string::npos);
}

TEST(AdapterPool, ReplacingAnAdapterEvictsNone) {
  AdapterPool pool(encoder(), options(1, {"lora"}));
  pool.insert(made_of("lora", "a"));
  pool.insert(made_of("lora", "a", /*seed=*/2));
  EXPECT_EQ(pool.stats().evictions, 0);
  pool.insert(made_of("lora", "b"));
  EXPECT_EQ(pool.stats().evictions, 1);
}

TEST(AdapterPool, ARowTakesAtMostATenthMoreThanItsAdaptersWeights) {
  AdapterPool pool(encoder(), options(8, {"unipelt"}));
  const auto module = graft(encoder(), {made_of("unipelt", "a")});
  EXPECT_LE(pool.stats().row_bytes, 1.1 * static_cast<double>(list_adapters(module)[0].bytes));
  EXPECT_EQ(pool.stats().bank_bytes, 8 * pool.stats().row_bytes);
}

TEST(AdapterPool, SixtyFourRowsServeAThousandAdapters) {
  constexpr int64_t kAdapters = 1000;
  constexpr int64_t kResident = 64;
  const AdapterFolder folder("unipelt", kAdapters);
  AdapterPool pool(encoder(), options(kResident, {"unipelt"}), folder.loader());
  const torch::jit::Module everything = folder.graft_all();  // other tests compare such modules with the oracle

  std::mt19937 random(0);
  for (int batch = 0; batch < 40; ++batch) {
    std::vector<std::string> names;
    std::vector<int64_t> numbers;
    for (int row = 0; row < 16; ++row) {
      numbers.push_back(std::uniform_int_distribution<int64_t>(-1, kAdapters - 1)(random));
      names.push_back(numbers.back() < 0 ? "" : AdapterFolder::name_of(numbers.back()));
    }
    const at::Tensor x = at::randn({16, 7, 12});
    const auto lease = pool.acquire(names);
    EXPECT_LT(largest_difference(run(lease, x), run_rows(everything, x, numbers)), kTolerance) << "batch " << batch;
  }
  EXPECT_EQ(pool.stats().resident, kResident);
  EXPECT_GT(pool.stats().evictions, 500);
  EXPECT_EQ(pool.stats().rebuilds, 0);
}

TEST(AdapterPool, CompositionsAreNamedWithTheRemedy) {
  const auto has = [](const std::string& error, const std::string& text) {
    EXPECT_NE(error.find(text), std::string::npos) << error;
  };
  auto module = graft(encoder(), {made_of("seq_bn[reduction_factor=4]", "a"), made_of("lora", "b")});
  module = compose(module, "both", composition_from_string("Stack(a, b)"));
  const auto folder = std::filesystem::temp_directory_path() / ("torchgraft_setup_" + std::to_string(getpid()));
  std::filesystem::create_directory(folder);
  std::ofstream(folder / "adapter_setup.json") << "{}";
  EXPECT_TRUE(is_setup_directory(folder.string()));
  for (const std::string& error : {error_of([&] { read_adapter_directory(folder.string()); }),
                                   error_of([&] { read_adapter_config(folder.string()); })}) {
    has(error, ": it holds a composition (adapter_setup.json), not an adapter; load_adapter_setup reads it in Python");
  }
  std::filesystem::remove_all(folder);
  EXPECT_FALSE(is_setup_directory(folder.string()));
  has(error_of([&] { compose(module, "c", composition_from_string("MultiTask(a, b)")); }),
      "compose: 'c', MultiTask(a, b): the adapters library has MultiTask for LoRAs only, and 'a' has output_adapter");
}

}  // namespace
}  // namespace torchgraft
