#include <ATen/ATen.h>
#include <torchgraft/ops/cpu/read_tokens.h>
#include <torchgraft/ops/cpu/token_tiles.h>

#include <cstring>
#include <map>

namespace torchgraft::ops::cpu {
namespace {

// Means of the sigmoids over the tokens of each row, in the tokens' order.
void pool(Gate& gate, const RowArguments& rows, const Selection& selection) {
  const int64_t batch = gate.sigmoids.size(0);
  const int64_t tokens = gate.sigmoids.size(1);
  const int64_t gates = gate.sigmoids.size(2);
  const bool masked = rows.token_mask.defined();
  const at::Tensor mask = masked ? rows.token_mask.contiguous() : at::Tensor();
  gate.tokens = at::empty({masked ? batch : 1, 1}, gate.sigmoids.options());
  gate.value = at::zeros({batch, gates}, gate.sigmoids.options());
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
        std::fill_n(token, gates, 0.0F);  // also the right derivative of what is not averaged
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

std::optional<FusedActivation> fused_activation(std::string_view non_linearity) {
  static const std::map<std::string_view, FusedActivation> kActivations = {
      {"gelu", FusedActivation::kGelu},
      {"gelu_accurate", FusedActivation::kGeluTanh},
      {"gelu_fast", FusedActivation::kGeluTanh},
      {"gelu_new", FusedActivation::kGeluTanh},
      {"gelu_python", FusedActivation::kGelu},
      {"gelu_python_tanh", FusedActivation::kGeluTanh},
      {"gelu_pytorch_tanh", FusedActivation::kGeluTanh},
      {"linear", FusedActivation::kIdentity},
      {"relu", FusedActivation::kRelu},
      {"sigmoid", FusedActivation::kSigmoid},
      {"silu", FusedActivation::kSilu},
      {"swish", FusedActivation::kSilu},
      {"tanh", FusedActivation::kTanh}};
  const auto found = kActivations.find(non_linearity);
  return found == kActivations.end() ? std::nullopt : std::optional(found->second);
}

TokenReading read_tokens(const at::Tensor& input, const TokenReader& reader, const RowArguments& rows,
                         const Selection& selection) {
  const at::Tensor x = input.contiguous();
  const int64_t features = x.size(2);
  const TokenRuns runs = token_runs(selection, x.size(0), x.size(1));
  const Kernels& table = kernels();
  const bool gated = rows.gate_weight.defined();
  const bool has_weight = reader.weight.defined();
  const int64_t width = has_weight ? reader.weight.size(1) : 0;
  const int64_t gates = gated ? rows.gate_weight.size(1) : 0;
  TokenReading result;
  if (has_weight) {
    result.hidden = at::empty({x.size(0), x.size(1), width}, x.options());
    result.inner = reader.keep_inner ? at::empty_like(result.hidden) : at::Tensor();
  }
  if (gated) {
    result.gate.sigmoids = at::empty({x.size(0), x.size(1), gates}, x.options());
  }
  const BankSlices weights(reader.weight);
  const BankSlices biases(reader.bias);
  const BankSlices gate_weights(rows.gate_weight);
  const BankSlices gate_biases(rows.gate_bias);
  const auto* from = x.const_data_ptr<float>();
  float* hidden = has_weight ? result.hidden.mutable_data_ptr<float>() : nullptr;
  float* inner = result.inner.defined() ? result.inner.mutable_data_ptr<float>() : nullptr;
  float* sigmoids = gated ? result.gate.sigmoids.mutable_data_ptr<float>() : nullptr;

  for_each_tile(runs, [&](int64_t run, int64_t begin, int64_t end) {
    const int64_t first = run * runs.tokens + begin;
    const int64_t count = end - begin;
    const int64_t adapter = runs.adapters[run];
    if (adapter < 0) {
      for (auto& [target, size] : {std::pair(hidden, width), std::pair(inner, width), std::pair(sigmoids, gates)}) {
        if (target != nullptr) {
          std::fill_n(target + first * size, count * size, 0.0F);
        }
      }
      return;
    }
    DotProduct job;
    job.rows = count;
    job.depth = features;
    job.x = from + first * features;
    job.x_stride = features;
    job.w_stride = features;
    if (hidden != nullptr) {
      job.columns = job.y_stride = width;
      job.w = weights.of(adapter);
      job.bias = biases.of(adapter);
      job.y = hidden + first * width;
      table.dot_product(job);
      if (inner != nullptr) {
        std::memcpy(inner + first * width, job.y, sizeof(float) * count * width);
      }
      table.activate(reader.activation, job.y, count * width);
    }
    if (sigmoids != nullptr) {
      job.columns = job.y_stride = gates;
      job.w = gate_weights.of(adapter);
      job.bias = gate_biases.of(adapter);
      job.y = sigmoids + first * gates;
      table.dot_product(job);
      table.activate(FusedActivation::kSigmoid, job.y, count * gates);
    }
  });
  if (gated) {
    pool(result.gate, rows, selection);
  }
  return result;
}

}  // namespace torchgraft::ops::cpu
