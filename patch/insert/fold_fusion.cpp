#include <torchgraft/patch/insert/fold_fusion.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

namespace torchgraft {
namespace {

int64_t most_rows(const std::vector<ComposedPart>& parts) {
  int64_t rows = 0;
  for (const ComposedPart& part : parts) {
    rows = std::max(rows, part.weights->at("down_weight").size(0));
  }
  return rows;
}

bool can_fold(const AdapterFusion& fusion, const std::vector<ComposedPart>& parts) {
  if (fusion.trainable || fusion.config.residual_before || parts.empty()) {
    return false;
  }
  const at::Tensor& down = parts.front().weights->at("down_weight");
  const bool is_wide = static_cast<int64_t>(parts.size()) * most_rows(parts) > 2 * down.size(1);
  const bool is_exact = down.scalar_type() == at::kFloat || down.scalar_type() == at::kDouble;
  return is_exact && !is_wide && std::all_of(parts.begin(), parts.end(), [&](const ComposedPart& part) {
           const BottleneckForm& form = part.slot->form;
           return !part.trainable && !form.norm_before && form.non_linearity == parts.front().slot->form.non_linearity;
         });
}

// With zeros behind it along the first dimension.
at::Tensor filled_up(const at::Tensor& value, int64_t rows) {
  std::vector<int64_t> sizes = value.sizes().vec();
  sizes[0] = rows;
  at::Tensor result = at::zeros(sizes, value.options());
  result.narrow(0, 0, value.size(0)).copy_(value);
  return result;
}

at::Tensor wide(const at::Tensor& tensor) { return tensor.detach().to(at::kDouble); }

// key^T (query x + bias), without the key's bias, which is the same in all scores: [H, H] and [H].
std::pair<at::Tensor, at::Tensor> score_map(const FusionConfig& config, const ModuleWeights& layer, int64_t hidden,
                                            const at::TensorOptions& options) {
  at::Tensor product = at::eye(hidden, options);
  at::Tensor bias = at::zeros({hidden}, options);
  if (config.query) {
    product = wide(layer.at("query_weight"));
    bias = wide(layer.at("query_bias"));
  }
  if (config.key) {
    const at::Tensor key = wide(layer.at("key_weight")).t();
    product = at::matmul(key, product);
    bias = at::mv(key, bias);
  }
  return {product, bias};
}

}  // namespace

std::optional<FoldedFusion> fold_fusion(const AdapterFusion& fusion, const ModuleWeights& layer,
                                        const std::vector<ComposedPart>& parts) {
  if (!can_fold(fusion, parts)) {
    return std::nullopt;
  }
  const int64_t rows = most_rows(parts);
  const at::Tensor& first = parts.front().weights->at("down_weight");
  std::vector<at::Tensor> downs, biases, ups, up_biases;
  for (const ComposedPart& part : parts) {
    const auto of = [&](const char* name) { return wide(part.weights->at(name)); };
    const at::Tensor scaling = of("scaling");  // [1] or [H]
    downs.push_back(filled_up(of("down_weight"), rows));
    biases.push_back(filled_up(of("down_bias"), rows));
    ups.push_back(filled_up((of("up_weight") * scaling.unsqueeze(-1)).t(), rows));
    up_biases.push_back(of("up_bias") * scaling);
  }
  const at::Tensor up = at::cat(ups);               // [n R, H]
  const at::Tensor up_bias = at::stack(up_biases);  // [n, H]
  const at::Tensor values = at::cat({up, up_bias});
  const auto [product, bias] = score_map(fusion.config, layer, first.size(1), up.options());
  const at::Tensor value = fusion.config.value ? wide(layer.at("value_weight")) : at::Tensor();
  const auto valued = [&](const at::Tensor& out) { return value.defined() ? at::matmul(out, value.t()) : out; };
  const auto narrow = [&](const at::Tensor& tensor) { return tensor.to(first.scalar_type()).contiguous(); };
  FoldedFusion result;
  result.adapters = static_cast<int64_t>(parts.size());
  result.non_linearity = parts.front().slot->form.non_linearity;
  result.down = narrow(at::cat(downs));
  result.down_bias = narrow(at::cat(biases));
  result.score = narrow(at::matmul(values, product));
  result.score_bias = narrow(at::mv(values, bias));
  result.up = narrow(valued(up).t());
  result.up_bias = narrow(valued(up_bias));
  return result;
}

}  // namespace torchgraft
