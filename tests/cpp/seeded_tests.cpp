#include <ATen/Context.h>

#include <gtest/gtest.h>

#include <cstdint>

// Every suite links this: each test draws the same numbers in each run, whichever tests ran before it. LibTorch itself
// seeds its generator from the machine's noise, and about one input of a hundred drawn ones amplifies rounding beyond a
// tolerance of 1e-5.
namespace torchgraft {
namespace {

// Seeds that no test uses itself: an input must not consist of the numbers of some weight.
constexpr uint64_t kSeedOfSuite = 20'000;
constexpr uint64_t kSeedOfTest = 10'000;

class SeedEachTest : public ::testing::EmptyTestEventListener {
  // Before SetUpTestSuite(), and before the fixture's constructor.
  void OnTestSuiteStart(const ::testing::TestSuite&) override { at::manual_seed(kSeedOfSuite); }
  void OnTestStart(const ::testing::TestInfo&) override { at::manual_seed(kSeedOfTest); }
};

[[maybe_unused]] const bool kListens = [] {
  ::testing::UnitTest::GetInstance()->listeners().Append(new SeedEachTest);  // which GoogleTest deletes
  return true;
}();

}  // namespace
}  // namespace torchgraft
