#include <ATen/ATen.h>

#include <gtest/gtest.h>

// seeded_tests.cpp, which every suite links.
namespace torchgraft {
namespace {

bool are_first_after(uint64_t seed, const at::Tensor& drawn) {
  at::manual_seed(seed);
  return at::equal(drawn, at::randn({4}));
}

class SeededTests : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { of_suite_ = at::randn({4}); }

  inline static at::Tensor of_suite_;
  const at::Tensor of_fixture_ = at::randn({4});
};

TEST_F(SeededTests, ASuiteDrawsTheSameNumbersInEachRun) { EXPECT_TRUE(are_first_after(20'000, of_suite_)); }

TEST_F(SeededTests, AFixtureDrawsTheSameNumbersInEachTest) { EXPECT_TRUE(are_first_after(10'000, of_fixture_)); }

TEST(SeededTestsOfNoFixture, DrawTheSameNumbersInEachTest) { EXPECT_TRUE(are_first_after(10'000, at::randn({4}))); }

}  // namespace
}  // namespace torchgraft
