#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

// What the suites of the ops share.
namespace torchgraft::ops::test {

// How each case names its adapters: one for all rows (then `ids` is empty), or one per row.
struct Rows {
  const char* name;
  std::vector<int64_t> ids;
  int64_t adapter = 0;

  std::optional<at::Tensor> tensor() const {
    return ids.empty() ? std::nullopt : std::make_optional(at::tensor(ids, at::kLong));
  }
  int64_t of(int64_t row) const { return ids.empty() ? adapter : ids[row]; }
  friend std::ostream& operator<<(std::ostream& stream, const Rows& rows) { return stream << rows.name; }
};

// Three rows, a bank of three.
inline const std::vector<Rows> kRows = {{"first", {}, 0},        {"last", {}, 2},           {"base", {}, -1},
                                        {"mixed", {2, 0, 1}},    {"with_base", {1, -1, 0}}, {"all_base", {-1, -1, -1}},
                                        {"all_equal", {1, 1, 1}}};

inline void expect_close(const at::Tensor& actual, const at::Tensor& expected, double rtol = 1e-9,
                         double atol = 1e-10) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  EXPECT_TRUE(at::allclose(actual.to(at::kDouble), expected.to(at::kDouble), rtol, atol))
      << "largest difference " << (actual.to(at::kDouble) - expected.to(at::kDouble)).abs().max();
}

// `call` throws a c10::Error whose first line is `text`.
template <typename Call>
void expect_error(const Call& call, const std::string& text) {
  try {
    call();
    ADD_FAILURE() << "no error; expected: " << text;
  } catch (const c10::Error& error) {
    EXPECT_EQ(error.msg(), text);
  }
}

inline at::Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

// The gate of one row, from its definition: x [S, I], weight [1, I], bias [1], tokens bool [S].
inline at::Tensor naive_gate(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                             const at::Tensor& tokens) {
  double sum = 0;
  int64_t count = 0;
  for (int64_t token = 0; token < x.size(0); ++token) {
    if (tokens[token].item<bool>()) {
      sum += at::sigmoid((x[token] * weight[0]).sum() + bias[0]).item<double>();
      ++count;
    }
  }
  return at::scalar_tensor(count == 0 ? 0.0 : sum / static_cast<double>(count), at::kDouble);
}

}  // namespace torchgraft::ops::test
