#include "adapter_folder.h"

#include <torchgraft/patch/compose.h>

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <future>
#include <thread>

// What a name in an AdapterPool leads to: an adapter or a composition, never both.
namespace torchgraft {
namespace {

using testing::encoder;
using testing::error_of;
using testing::made_of;

constexpr const char* kBottleneck = "seq_bn[reduction_factor=4]";
constexpr const char* kRefused =
    "AdapterPool: 'Stack(a, b)' cannot be a name: it is the text of a composition; give it another one (of a module's "
    "adapter or composition: rename_adapter)";

AdapterPoolOptions rows(int64_t capacity) {
  AdapterPoolOptions options;
  options.capacity = capacity;
  return options;
}

TEST(PoolNames, TheTextOfACompositionIsNoName) {
  AdapterPool pool(encoder(), rows(3));
  pool.insert(made_of(kBottleneck, "a"));
  EXPECT_EQ(error_of([&] { pool.insert(made_of(kBottleneck, "Stack(a, b)")); }), kRefused);
  EXPECT_EQ(error_of([&] { pool.compose("Stack(a, b)", composition_from_string("Average(a, b)")); }), kRefused);
  EXPECT_EQ(pool.resident(), std::vector<std::string>{"a"});
  EXPECT_TRUE(pool.compositions().empty());
  pool.insert(made_of(kBottleneck, "Stacks(a, b)"));  // no text of one
  EXPECT_EQ(pool.acquire({"Stacks(a, b)"}).ids().size(), 1U);
}

TEST(PoolNames, AModuleWithSuchANameIsRefused) {
  const torch::jit::Module named = graft(encoder(), {made_of(kBottleneck, "Stack(a, b)")});
  EXPECT_EQ(error_of([&] { AdapterPool(named, rows(3)); }), kRefused);
  const torch::jit::Module plain = graft(encoder(), {made_of(kBottleneck, "a"), made_of(kBottleneck, "b")});
  const torch::jit::Module composed = compose(plain, "Stack(a, b)", composition_from_string("Average(a, b)"));
  EXPECT_EQ(error_of([&] { AdapterPool(composed, rows(3)); }), kRefused);
}

// One thread asks for "x" while another calls a composition so; both wait for a third one that loads. Whoever comes
// first, the other one finds the name taken.
TEST(PoolNames, ANameThatIsGivenMeanwhileLeadsToOneThing) {
  std::atomic<bool> is_loading{false};
  std::promise<void> go_on;
  const auto pause = [] { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
  for (int round = 0; round < 8; ++round) {
    is_loading = false;
    go_on = {};
    AdapterPool pool(encoder(), rows(4), [&](const std::string& name) {
      if (name == "slow") {
        is_loading = true;
        go_on.get_future().wait();
      }
      return made_of(kBottleneck, name);
    });
    std::thread loads([&] { pool.acquire({"slow"}); });
    while (!is_loading) {
      std::this_thread::yield();
    }
    std::string refusal;
    std::thread composes(
        [&] { refusal = error_of([&] { pool.compose("x", composition_from_string("Stack(a, b)")); }); });
    pause();
    std::vector<int64_t> ids;
    std::thread asks([&] { ids = pool.acquire({"x"}).ids(); });
    pause();
    go_on.set_value();
    loads.join();
    composes.join();
    asks.join();
    const std::vector<std::string> resident = pool.resident();
    const bool is_adapter = std::count(resident.begin(), resident.end(), "x") > 0;
    EXPECT_NE(is_adapter, pool.compositions().count("x") > 0);
    EXPECT_EQ(is_adapter, !refusal.empty()) << refusal;
    EXPECT_EQ(is_adapter, ids.front() < 4);  // ids of compositions follow those of the rows
  }
}

}  // namespace
}  // namespace torchgraft
