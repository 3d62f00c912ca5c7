#include <ATen/ATen.h>
#include <torchgraft/ops/cpu/expand.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/cpu/token_tiles.h>

#include <cstring>

namespace torchgraft::ops::cpu {
namespace {

// With this many columns of `hidden` or more, sums along them are faster than products with the transposed weight. For
// rows of few tokens they always are: to transpose a weight costs more than to read it.
constexpr int64_t kLongSum = 96;
constexpr int64_t kFewTokens = 4;

// A slice's weight, transposed: [R, O], and below it the bias. Per-channel scaling is multiplied in.
class WideTable {
 public:
  WideTable(const Expansion& expansion, bool per_channel)
      : weight_(expansion.weight),
        bias_(expansion.bias),
        scaling_(per_channel ? expansion.scaling : at::Tensor()),
        columns_(expansion.weight.size(1)),
        depth_(expansion.weight.size(2)),
        has_bias_(expansion.bias.defined()) {}

  int64_t rows() const { return depth_ + has_bias_; }
  bool has_bias() const { return has_bias_; }

  std::vector<float> of(int64_t slice) const {
    std::vector<float> table(rows() * columns_);
    const FloatView scale(scaling_.of(slice), columns_);
    const FloatView weight(weight_.of(slice), columns_ * depth_);
    kernels().transpose(weight.data(), depth_, columns_, depth_, scale.data(), table.data(), columns_);
    if (has_bias_) {
      const FloatView bias(bias_.of(slice), columns_);
      float* last = table.data() + depth_ * columns_;
      for (int64_t i = 0; i < columns_; ++i) {
        last[i] = bias.data()[i] * (scale.data() == nullptr ? 1.0F : scale.data()[i]);
      }
    }
    return table;
  }

 private:
  BankSlices weight_;
  BankSlices bias_;
  BankSlices scaling_;
  int64_t columns_;
  int64_t depth_;
  bool has_bias_;
};

}  // namespace

std::vector<float> row_coefficients(const at::Tensor& scaling, const Gate& gate, const TokenRuns& runs, int64_t batch) {
  const BankSlices scales(scaling);
  const float* gates = gate.value.defined() ? gate.value.const_data_ptr<float>() : nullptr;
  const int64_t columns = gate.value.defined() ? gate.value.size(1) : 0;
  std::vector<float> result(batch, 0.0F);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t slice = runs.slices[runs.count() == 1 ? 0 : b];
    if (slice >= 0) {
      const float scale = scaling.defined() ? scales.of(slice)[0] : 1.0F;
      result[b] = gates == nullptr ? scale : scale * gates[b * columns];
    }
  }
  return result;
}

void scale_rows(const float* x, int64_t rows, int64_t columns, const std::vector<float>& coefficients, int64_t first,
                int64_t tokens, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const float coefficient = coefficients[(first + i) / tokens];
    for (int64_t k = 0; k < columns; ++k) {
      to[i * to_stride + k] = x[i * columns + k] * coefficient;
    }
  }
}

namespace {

// One call of expand(), on raw pointers.
class Expander {
 public:
  Expander(const at::Tensor& base, const at::Tensor& hidden, const Expansion& expansion, const Gate& gate,
           const Selection& selection)
      : tokens_(base.size(1)),
        depth_(hidden.size(2)),
        columns_(base.size(2)),
        per_channel_(expansion.scaling.dim() == 2 && expansion.scaling.size(1) != 1),
        runs_(token_runs(selection, base.size(0), base.size(1))),
        wide_(expansion, per_channel_),
        weight_(expansion.weight),
        bias_(expansion.bias),
        coefficients_(row_coefficients(per_channel_ ? at::Tensor() : expansion.scaling, gate, runs_, base.size(0))),
        base_(base),
        hidden_(hidden) {}

  at::Tensor run() {
    at::Tensor output = at::empty_like(base_);
    const int64_t element = output.element_size();
    auto* to = static_cast<char*>(output.mutable_data_ptr());
    const bool sums = !per_channel_ && (depth_ >= kLongSum || tokens_ <= kFewTokens);
    std::vector<float> table;  // of all tiles, when they use one slice
    if (!sums && runs_.count() == 1 && runs_.slices[0] >= 0) {
      table = wide_.of(runs_.slices[0]);
    }
    for_each_tile(runs_, [&](int64_t run, int64_t begin, int64_t end) {
      const int64_t first = run * runs_.tokens + begin;
      const int64_t slice = runs_.slices[run];
      const int64_t count = end - begin;
      const Numbers from = numbers_of(base_) + first * columns_;
      char* tile_to = to + first * columns_ * element;
      if (slice < 0) {
        if (columns_ > 0) {  // else both are null, which memcpy may not get
          std::memcpy(tile_to, from.data, count * columns_ * element);
        }
        return;
      }
      FloatResult tile(from.is_bfloat16, tile_to, count, columns_, columns_);
      const FloatView init(from, count * columns_);
      if (sums) {
        dot_tile(slice, first, count, init.data(), tile.data());
      } else if (runs_.count() == 1) {
        outer_tile(table, first, count, init.data(), tile.data());
      } else {
        outer_tile(wide_.of(slice), first, count, init.data(), tile.data());
      }
      tile.store();
    });
    return output;
  }

 private:
  // c hidden [count, depth]; with a bias, c stands behind each row.
  std::vector<float> scaled(int64_t first, int64_t count) const {
    const int64_t width = wide_.rows();
    std::vector<float> result(count * width);
    scale_rows(hidden_.const_data_ptr<float>() + first * depth_, count, depth_, coefficients_, first, tokens_,
               result.data(), width);
    for (int64_t i = 0; i < count && wide_.has_bias(); ++i) {
      result[i * width + depth_] = coefficients_[(first + i) / tokens_];
    }
    return result;
  }

  // table: of the tile's slice
  void outer_tile(const std::vector<float>& table, int64_t first, int64_t count, const float* init, float* to) const {
    const std::vector<float> narrow = scaled(first, count);
    OuterProduct job;
    job.rows = count;
    job.columns = job.w_stride = job.init_stride = job.y_stride = columns_;
    job.init = init;
    job.y = to;
    job.depth = job.x_stride = wide_.rows();
    job.x = narrow.data();
    job.w = table.data();
    kernels().outer_product(job);
  }

  void dot_tile(int64_t slice, int64_t first, int64_t count, const float* init, float* to) const {
    const std::vector<float> narrow = scaled(first, count);
    DotProduct job;
    job.rows = count;
    job.columns = job.init_stride = job.y_stride = columns_;
    job.init = init;
    job.y = to;
    job.depth = job.w_stride = depth_;
    job.x = narrow.data();
    job.x_stride = job.x2_stride = wide_.rows();
    job.w = weight_.of(slice);
    if (wide_.has_bias()) {
      job.depth2 = job.w2_stride = 1;
      job.x2 = narrow.data() + depth_;
      job.w2 = bias_.of(slice);
    }
    multiply(job, tokens_, columns_);
  }

  int64_t tokens_;  // of a batch row
  int64_t depth_;
  int64_t columns_;
  bool per_channel_;
  TokenRuns runs_;
  WideTable wide_;
  BankSlices weight_;
  BankSlices bias_;
  std::vector<float> coefficients_;
  at::Tensor base_;
  at::Tensor hidden_;
};

}  // namespace

at::Tensor expand(const at::Tensor& base, const at::Tensor& hidden, const Expansion& expansion, const Gate& gate,
                  const Selection& selection) {
  return Expander(base.contiguous(), hidden, expansion, gate, selection).run();
}

}  // namespace torchgraft::ops::cpu
