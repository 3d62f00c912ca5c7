#include <ATen/ATen.h>
#include <torchgraft/ops/cpu/read_tokens.h>
#include <torchgraft/ops/cpu/token_tiles.h>

#include <vector>

namespace torchgraft::ops::cpu {
namespace {

// x [count, features]: the tokens from `first` on, of one slice of the banks.
struct TokenTile {
  const float* x;
  bool is_bfloat16;  // every number of x is a value that bfloat16 has
  int64_t features;
  int64_t row_tokens;  // tokens of a batch row
  int64_t first;
  int64_t count;
  int64_t slice;  // -1: base rows
};

// One product that is read off the tokens: f(x weight^T + bias), [B S, width].
struct Columns {
  BankSlices weight;
  BankSlices bias;
  int64_t width;
  FusedActivation activation;
  float* to;
  float* before;  // x weight^T + bias, without f; may be null

  void compute(const TokenTile& tile) const {
    const auto [x, is_bfloat16, features, row_tokens, first, count, slice] = tile;
    const int64_t size = count * width;
    float* values = to + first * width;
    if (slice < 0) {
      std::fill_n(values, size, 0.0F);
    } else {
      DotProduct job;
      job.rows = count;
      job.columns = job.y_stride = width;
      job.depth = job.x_stride = job.w_stride = features;
      job.x = x;
      job.x_is_bfloat16 = is_bfloat16;
      job.w = weight.of(slice);
      job.bias = bias.of(slice);
      job.y = values;
      multiply(job, row_tokens, width);
    }
    if (before != nullptr) {
      std::copy_n(values, size, before + first * width);
    }
    if (slice >= 0) {
      kernels().activate(activation, values, size);
    }
  }
};

// Means of the sigmoids over the tokens of each row, in the tokens' order.
void pool(Gate& gate, const RowArguments& rows, const Selection& selection) {
  const int64_t batch = gate.sigmoids.size(0);
  const int64_t tokens = gate.sigmoids.size(1);
  const int64_t gates = gate.sigmoids.size(2);
  const bool masked = rows.token_mask.defined();
  const at::Tensor mask = masked ? rows.token_mask.contiguous() : at::Tensor();
  gate.tokens = at::empty({masked ? batch : 1, 1}, gate.sigmoids.options());
  gate.value = at::empty({batch, gates}, gate.sigmoids.options());
  auto* counts = gate.tokens.mutable_data_ptr<float>();
  auto* sigmoids = gate.sigmoids.mutable_data_ptr<float>();
  auto* values = gate.value.mutable_data_ptr<float>();
  counts[0] = static_cast<float>(std::max<int64_t>(tokens, 1));
  for (int64_t b = 0; b < batch; ++b) {
    const bool* real = masked ? mask.const_data_ptr<bool>() + b * tokens : nullptr;
    int64_t count = 0;
    for (int64_t s = 0; s < tokens; ++s) {
      float* token = sigmoids + (b * tokens + s) * gates;
      if (real != nullptr && !real[s]) {
        std::fill_n(token, gates, 0.0F);  // s (1 - s) = 0: a token that is not averaged has no gradient either
      }
      count += real == nullptr || real[s];
    }
    if (masked) {
      counts[b] = static_cast<float>(std::max<int64_t>(count, 1));
    }
    for (int64_t g = 0; g < gates; ++g) {
      double sum = 0.0;
      for (int64_t s = 0; s < tokens; ++s) {
        sum += sigmoids[(b * tokens + s) * gates + g];
      }
      values[b * gates + g] = static_cast<float>(sum / static_cast<double>(counts[masked ? b : 0]));
    }
  }
  gate.value = zero_base_rows(selection, gate.value);
}

}  // namespace

std::optional<FusedActivation> fused_activation(NonLinearity function) {
  switch (function) {
    case NonLinearity::kGelu:
      return FusedActivation::kGelu;
    case NonLinearity::kGeluTanh:
      return FusedActivation::kGeluTanh;
    case NonLinearity::kIdentity:
      return FusedActivation::kIdentity;
    case NonLinearity::kRelu:
      return FusedActivation::kRelu;
    case NonLinearity::kSigmoid:
      return FusedActivation::kSigmoid;
    case NonLinearity::kSilu:
      return FusedActivation::kSilu;
    case NonLinearity::kTanh:
      return FusedActivation::kTanh;
    default:
      return std::nullopt;
  }
}

TokenReading read_tokens(const at::Tensor& input, const TokenReader& reader, const RowArguments& rows,
                         const Selection& selection) {
  const at::Tensor x = input.contiguous();
  const int64_t features = x.size(2);
  const TokenRuns runs = token_runs(selection, x.size(0), x.size(1));
  TokenReading result;
  std::vector<Columns> parts;
  const auto add = [&](const at::Tensor& weight, const at::Tensor& bias, FusedActivation activation) {
    const at::Tensor values = at::empty({x.size(0), x.size(1), weight.size(1)}, x.options().dtype(at::kFloat));
    parts.push_back({.weight = BankSlices(weight),
                     .bias = BankSlices(bias),
                     .width = weight.size(1),
                     .activation = activation,
                     .to = values.mutable_data_ptr<float>(),
                     .before = nullptr});
    return values;
  };
  if (reader.weight.defined()) {
    result.hidden = add(reader.weight, reader.bias, reader.activation);
    if (reader.keep_inner) {
      result.inner = at::empty_like(result.hidden);
      parts.back().before = result.inner.mutable_data_ptr<float>();
    }
  }
  const bool gated = rows.gate.weight.defined();
  if (gated) {
    result.gate.sigmoids = add(rows.gate.weight, rows.gate.bias, FusedActivation::kSigmoid);
  }
  const Numbers from = numbers_of(x);
  for_each_tile(runs, [&](int64_t run, int64_t begin, int64_t end) {
    const int64_t first = run * runs.tokens + begin;
    const FloatView tokens(from + first * features, (end - begin) * features);
    const TokenTile tile{.x = tokens.data(),
                         .is_bfloat16 = from.is_bfloat16,
                         .features = features,
                         .row_tokens = x.size(1),
                         .first = first,
                         .count = end - begin,
                         .slice = runs.slices[run]};
    for (const Columns& part : parts) {
      part.compute(tile);
    }
  });
  if (gated) {
    pool(result.gate, rows, selection);
  }
  return result;
}

}  // namespace torchgraft::ops::cpu
