#include <ATen/ATen.h>
#include <torchgraft/ops/cpu/expand.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/cpu/token_tiles.h>

namespace torchgraft::ops::cpu {
namespace {

// One adapter's weight, transposed: [R, O], and below it the bias. Per-channel scaling is multiplied in.
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
  int64_t columns() const { return columns_; }
  bool has_bias() const { return has_bias_; }

  // Into `table`, unless `made_for`, which is updated, says that it is there.
  void make(int64_t adapter, std::vector<float>& table, int64_t& made_for) const {
    if (made_for == adapter) {
      return;
    }
    made_for = adapter;
    table.resize(rows() * columns_);
    const float* scale = scaling_.of(adapter);
    kernels().transpose(weight_.of(adapter), depth_, columns_, depth_, scale, table.data(), columns_);
    if (has_bias_) {
      const float* bias = bias_.of(adapter);
      float* last = table.data() + depth_ * columns_;
      for (int64_t i = 0; i < columns_; ++i) {
        last[i] = bias[i] * (scale == nullptr ? 1.0F : scale[i]);
      }
    }
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

std::vector<float> row_coefficients(const at::Tensor& per_adapter, const Gate& gate, const Selection& selection,
                                    int64_t batch) {
  const TokenRuns rows = token_runs(selection, batch, 1);
  const BankSlices scaling(per_adapter);
  const float* gates = gate.value.defined() ? gate.value.const_data_ptr<float>() : nullptr;
  const int64_t columns = gate.value.defined() ? gate.value.size(1) : 0;
  std::vector<float> result(batch, 0.0F);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t adapter = rows.adapters[rows.count() == 1 ? 0 : b];
    if (adapter >= 0) {
      const float scale = per_adapter.defined() ? scaling.of(adapter)[0] : 1.0F;
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

at::Tensor expand(const at::Tensor& base, const at::Tensor& hidden, const Expansion& expansion, const Gate& gate,
                  const Selection& selection) {
  const at::Tensor init = base.contiguous();
  const int64_t batch = init.size(0);
  const int64_t tokens = init.size(1);
  const int64_t depth = hidden.size(2);
  const bool per_channel = expansion.scaling.dim() == 2 && expansion.scaling.size(1) != 1;
  const TokenRuns runs = token_runs(selection, batch, tokens);
  const WideTable wide(expansion, per_channel);
  const std::vector<float> coefficients =
      row_coefficients(per_channel ? at::Tensor() : expansion.scaling, gate, selection, batch);
  at::Tensor output = at::empty_like(init);
  const auto* from = init.const_data_ptr<float>();
  const auto* narrow = hidden.const_data_ptr<float>();
  auto* to = output.mutable_data_ptr<float>();

  std::vector<float> only;  // the table of a uniform batch
  int64_t only_for = -1;
  if (!selection.is_mixed()) {
    wide.make(selection.adapter, only, only_for);
  }
  for_each_tile(runs, [&](int64_t run, int64_t begin, int64_t end) {
    const int64_t first = run * runs.tokens + begin;
    const int64_t count = end - begin;
    const int64_t adapter = runs.adapters[run];
    OuterProduct job;
    job.rows = count;
    job.columns = job.w_stride = job.init_stride = job.y_stride = wide.columns();
    job.init = from + first * wide.columns();
    job.y = to + first * wide.columns();
    if (adapter < 0) {
      std::copy_n(job.init, count * wide.columns(), job.y);
      return;
    }
    std::vector<float> own;
    int64_t own_for = -1;
    if (only_for < 0) {
      wide.make(adapter, own, own_for);
    }
    std::vector<float> scaled(count * wide.rows());
    scale_rows(narrow + first * depth, count, depth, coefficients, first, tokens, scaled.data(), wide.rows());
    for (int64_t i = 0; i < count && wide.has_bias(); ++i) {
      scaled[i * wide.rows() + depth] = coefficients[(first + i) / tokens];
    }
    job.depth = job.x_stride = wide.rows();
    job.x = scaled.data();
    job.w = only_for < 0 ? own.data() : only.data();
    kernels().outer_product(job);
  });
  return output;
}

}  // namespace torchgraft::ops::cpu
