#include <ATen/ATen.h>
#include <torchgraft/ops/cpu/expand.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/cpu/projection.h>
#include <torchgraft/ops/cpu/token_tiles.h>

namespace torchgraft::ops::cpu {
namespace {

// Columns of the weight that one task computes: all if there are enough tokens for all threads, else a share.
int64_t columns_per_task(int64_t columns, int64_t tokens) {
  constexpr int64_t kTokensPerThread = 128;
  constexpr int64_t kMultiple = 24;  // of every register block's columns
  const int64_t threads = at::get_num_threads();
  if (threads == 1 || tokens >= kTokensPerThread * threads) {
    return columns;
  }
  const int64_t share = (columns + threads - 1) / threads;
  return std::min(columns, (share + kMultiple - 1) / kMultiple * kMultiple);
}

// An update's numbers: the narrow side with c multiplied in, and the bank's slices.
class UpdateTiles {
 public:
  UpdateTiles(const ProjectionUpdate& update, const TokenRuns& runs)
      : rank_(update.hidden.size(2)),
        tokens_(update.hidden.size(1)),
        weight_(update.weight),
        bias_(update.bias),
        has_bias_(update.bias.defined()),
        coefficients_(row_coefficients(update.scaling, update.gate, runs, update.hidden.size(0))),
        scaled_(at::empty_like(update.hidden)) {
    scale_rows(update.hidden.const_data_ptr<float>(), update.hidden.size(0) * tokens_, rank_, coefficients_, 0, tokens_,
               scaled_.mutable_data_ptr<float>(), rank_);
  }

  // Adds the products to `job`, whose rows are the tokens from `first` on, and whose columns start at `column`.
  void join(DotProduct& job, int64_t slice, int64_t first, int64_t column) const {
    job.depth2 = job.x2_stride = job.w2_stride = rank_;
    job.x2 = scaled_.const_data_ptr<float>() + first * rank_;
    job.w2 = weight_.of(slice) + column * rank_;
  }

  // y += c bias, for the rows and columns of `job`, after its products.
  void add_bias(const DotProduct& job, int64_t slice, int64_t first, int64_t column) const {
    if (!has_bias_) {
      return;
    }
    std::vector<float> coefficients(job.rows);
    for (int64_t i = 0; i < job.rows; ++i) {
      coefficients[i] = coefficients_[(first + i) / tokens_];
    }
    const FloatView bias(bias_.of(slice) + column, job.columns);
    OuterProduct sum;
    sum.rows = job.rows;
    sum.columns = sum.w_stride = job.columns;
    sum.depth = sum.x_stride = 1;
    sum.x = coefficients.data();
    sum.w = bias.data();
    sum.init = sum.y = job.y;
    sum.init_stride = sum.y_stride = job.y_stride;
    kernels().outer_product(sum);
  }

 private:
  int64_t rank_;
  int64_t tokens_;  // of a batch row
  BankSlices weight_;
  BankSlices bias_;
  bool has_bias_;
  std::vector<float> coefficients_;  // c of each batch row
  at::Tensor scaled_;                // [B, S, R]
};

}  // namespace

bool is_read_in_place(const at::Tensor& weight, int64_t row_tokens) {
  // The columns of larger weights do not fit into the second cache, or share few of its sets.
  constexpr int64_t kMost = 1024;
  return weight.is_contiguous() ||
         (weight.scalar_type() == at::kFloat && weight.t().is_contiguous() && weight.size(0) <= kMost &&
          weight.size(1) <= kMost && packs_tokens(row_tokens, weight.size(0)));
}

namespace {

at::Tensor projected(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                     const ProjectionUpdate& update, const Selection& selection, FusedActivation activation) {
  const at::Tensor x = input.contiguous();
  const at::Tensor projection = is_read_in_place(weight, x.size(1)) ? weight : weight.contiguous();
  const int64_t columns = projection.size(0);
  at::Tensor output = at::empty({x.size(0), x.size(1), columns}, x.options());
  if (output.numel() == 0) {
    return output;
  }
  const bool adapted = selection.kind != Selection::Kind::kBase;
  const TokenRuns runs = adapted ? token_runs(selection, x.size(0), x.size(1)) : TokenRuns{x.size(0) * x.size(1), {-1}};
  std::optional<UpdateTiles> tiles;
  if (adapted) {
    tiles.emplace(update, runs);
  }
  const at::Tensor dense_bias = bias.defined() ? bias.contiguous() : bias;
  const int64_t share = columns_per_task(columns, runs.count() * runs.tokens);
  const int64_t shares = (columns + share - 1) / share;
  const int64_t tile = shares > 1 ? std::max<int64_t>(runs.tokens, 1) : 64;
  const int64_t per_run = (runs.tokens + tile - 1) / tile;
  const Numbers from = numbers_of(x);
  const Numbers rows = numbers_of(projection);
  const Numbers offsets = numbers_of(dense_bias);
  const int64_t element = output.element_size();
  auto* to = static_cast<char*>(output.mutable_data_ptr());

  at::parallel_for(0, runs.count() * per_run * shares, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % shares * share;
      const int64_t run = task / shares / per_run;
      const int64_t in_run = task / shares % per_run * tile;
      const int64_t first = run * runs.tokens + in_run;
      const int64_t slice = runs.slices[run];
      DotProduct job;
      job.rows = std::min(tile, runs.tokens - in_run);
      job.columns = std::min(share, columns - column);
      job.depth = job.x_stride = x.size(2);
      job.w_stride = projection.stride(0);
      job.w_step = projection.stride(1);
      const FloatView tokens_at_hand(from + first * x.size(2), job.rows * x.size(2));
      FloatResult result(from.is_bfloat16, to + (first * columns + column) * element, job.rows, job.columns, columns);
      job.x = tokens_at_hand.data();
      job.x_is_bfloat16 = from.is_bfloat16;
      job.w = rows + column * job.w_stride;
      job.y = result.data();
      job.y_stride = result.stride();
      job.bias = offsets ? offsets + column : offsets;
      job.activation = activation;
      if (slice >= 0) {
        tiles->join(job, slice, first, column);
      }
      multiply(job, x.size(1), columns);
      if (slice >= 0) {
        tiles->add_bias(job, slice, first, column);
      }
      result.store();
    }
  });
  return output;
}

}  // namespace

at::Tensor linear_with_update(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                              const ProjectionUpdate& update, const Selection& selection) {
  return projected(x, weight, bias, update, selection, FusedActivation::kIdentity);
}

at::Tensor activated_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            FusedActivation activation) {
  return projected(x, weight, bias, {}, /*selection=*/{}, activation);
}

}  // namespace torchgraft::ops::cpu
