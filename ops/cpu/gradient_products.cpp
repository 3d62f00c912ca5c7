#include <ATen/ATen.h>
#include <torchgraft/ops/cpu/gradient_products.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/cpu/projection.h>
#include <torchgraft/ops/cpu/read_tokens.h>
#include <torchgraft/ops/cpu/token_tiles.h>

namespace torchgraft::ops::cpu {
namespace {

// Every batch is one run of tokens here: its rows all use the same slices, so nothing has to tell them apart.
TokenRuns one_run(const at::Tensor& tokens) { return {tokens.size(0) * tokens.size(1), {0}}; }

// tokens [B, S, K] -> [1, B S, K]
at::Tensor as_one_row(const at::Tensor& tokens) { return tokens.contiguous().flatten(0, 1).unsqueeze(0); }

// Of a bank of one slice.
Selection only_slice() {
  Selection selection;
  selection.kind = Selection::Kind::kUniform;
  selection.slice = 0;
  return selection;
}

at::Tensor in_float(const at::Tensor& narrow) { return narrow.to(at::kFloat).contiguous(); }

// y [R, count] += narrow [R, tokens] wide [tokens, count], for `count` columns of `wide` from `column` on. Some tokens
// at a time stay in a cache while all rows of y are updated.
void sum_columns(const at::Tensor& narrow, const at::Tensor& wide, int64_t column, int64_t count, float* y,
                 int64_t y_stride) {
  constexpr int64_t kTokens = 64;
  const int64_t tokens = narrow.size(1);
  const int64_t features = wide.size(-1);
  const Numbers from = numbers_of(wide);
  std::vector<float> widened(from.is_bfloat16 ? kTokens * count : 0);
  OuterProduct job;
  job.rows = narrow.size(0);
  job.columns = count;
  job.x_stride = tokens;
  job.init = job.y = y;
  job.init_stride = job.y_stride = y_stride;
  for (int64_t first = 0; first < tokens; first += kTokens) {
    job.depth = std::min(kTokens, tokens - first);
    job.x = narrow.const_data_ptr<float>() + first;
    if (from.is_bfloat16) {
      for (int64_t i = 0; i < job.depth; ++i) {
        kernels().widen(from.bfloat16() + (first + i) * features + column, count, widened.data() + i * count);
      }
      job.w = widened.data();
      job.w_stride = count;
    } else {
      job.w = from.float32() + first * features + column;
      job.w_stride = features;
    }
    kernels().outer_product(job);
  }
}

}  // namespace

at::Tensor narrow_product(const at::Tensor& grad, const at::Tensor& weight) {
  const at::Tensor bank = weight.t().contiguous().unsqueeze(0);  // [1, R, O]
  return read_tokens(as_one_row(grad), {.weight = bank}, /*rows=*/{}, only_slice())
      .hidden.view({grad.size(0), grad.size(1), weight.size(1)});
}

at::Tensor token_sum(const at::Tensor& left, const at::Tensor& right) {
  constexpr int64_t kColumns = 64;  // whole register blocks
  const bool left_is_narrow = left.size(2) <= right.size(2);
  const at::Tensor narrow = in_float((left_is_narrow ? left : right).flatten(0, 1).t());
  const at::Tensor wide = (left_is_narrow ? right : left).contiguous();
  const int64_t columns = wide.size(2);
  at::Tensor sum = at::zeros({narrow.size(0), columns}, narrow.options());
  auto* to = sum.mutable_data_ptr<float>();
  // Columns are divided, not tokens: a sum over tokens is the same for any number of threads.
  at::parallel_for(0, (columns + kColumns - 1) / kColumns, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns;
    sum_columns(narrow, wide, first, std::min(columns, end * kColumns) - first, to + first, columns);
  });
  return left_is_narrow ? sum : sum.t();
}

at::Tensor wide_product(const at::Tensor& narrow, const at::Tensor& weight) {
  const at::Tensor tokens = in_float(narrow);
  const at::Tensor table = in_float(weight);
  const int64_t depth = table.size(0);
  const int64_t columns = table.size(1);
  at::Tensor result = at::empty({tokens.size(0), tokens.size(1), columns}, weight.options());
  const bool is_bfloat16 = result.scalar_type() == at::kBFloat16;
  auto* to = static_cast<char*>(result.mutable_data_ptr());
  for_each_tile(one_run(tokens), [&](int64_t /*run*/, int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    const FloatResult tile(is_bfloat16, to + begin * columns * result.element_size(), count, columns, columns);
    std::fill_n(tile.data(), count * columns, 0.0F);
    OuterProduct job;
    job.rows = count;
    job.columns = job.w_stride = job.init_stride = job.y_stride = columns;
    job.depth = job.x_stride = depth;
    job.x = tokens.const_data_ptr<float>() + begin * depth;
    job.w = table.const_data_ptr<float>();
    job.init = job.y = tile.data();
    kernels().outer_product(job);
    tile.store();
  });
  return result;
}

bool suits_linear_gradient(const at::Tensor& weight, int64_t tokens) {
  constexpr int64_t kTokensWorthACopy = 64;
  const bool has_slow_rival = weight.scalar_type() == at::kBFloat16 && kernels().token_product_bfloat16 == nullptr;
  return is_read_in_place(weight.t(), tokens) || (has_slow_rival && tokens >= kTokensWorthACopy);
}

at::Tensor linear_gradient(const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& narrow,
                           const at::Tensor& narrow_weight) {
  ProjectionUpdate update;
  if (narrow.defined()) {
    update.hidden = as_one_row(in_float(narrow));
    update.weight = narrow_weight.t().contiguous().unsqueeze(0);  // [1, I, R]
  }
  const Selection selection = narrow.defined() ? only_slice() : Selection();
  return linear_with_update(as_one_row(grad), weight.t(), /*bias=*/{}, update, selection)
      .view({grad.size(0), grad.size(1), weight.size(1)});
}

}  // namespace torchgraft::ops::cpu
