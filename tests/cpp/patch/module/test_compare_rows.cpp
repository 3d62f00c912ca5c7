#include <torchgraft/patch/module/compare_rows.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

const at::Tensor kBase = at::zeros({3, 4, 2});
const at::Tensor kAdapter = at::ones({3, 4, 2});

at::Tensor changed_in(std::vector<int64_t> rows, double by = 1.0) {
  at::Tensor result = kBase.clone();
  for (const int64_t row : rows) {
    result[row] += by;
  }
  return result;
}

TEST(MovesRows, IsTrueWhereAnotherRowChangesInsteadOfTheFirst) {
  EXPECT_TRUE(moves_rows(kBase, kAdapter, changed_in({2}), 3));
  EXPECT_TRUE(moves_rows(kBase.transpose(0, 1), kAdapter.transpose(0, 1), changed_in({1}).transpose(0, 1), 3));
  const c10::IValue tuple = c10::ivalue::Tuple::create({kBase, at::arange(3)});
  const c10::IValue moved = c10::ivalue::Tuple::create({changed_in({1}), at::arange(3)});
  EXPECT_TRUE(moves_rows(tuple, c10::ivalue::Tuple::create({kAdapter, at::arange(3)}), moved, 3));
}

TEST(MovesRows, IsFalseWhereTheFirstChanges) {
  EXPECT_FALSE(moves_rows(kBase, kAdapter, changed_in({0}), 3));
  EXPECT_FALSE(moves_rows(kBase, kAdapter, changed_in({0, 1, 2}), 3)) << "rows that depend on each other";
  EXPECT_FALSE(moves_rows(kBase, kAdapter, kBase + 1e-5, 3)) << "rounding";
  EXPECT_FALSE(moves_rows(kBase, kAdapter, changed_in({2}), 4)) << "no dimension of that size";
}

}  // namespace
}  // namespace torchgraft
