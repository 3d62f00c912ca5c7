#include "data.h"

#include <torchgraft/plan/safetensors.h>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cmath>

namespace {

at::Tensor take(const torchgraft::StateDict& tensors, const std::string& path, const std::string& name) {
  const auto found = tensors.find(name);
  TORCH_CHECK(found != tensors.end(), path, ": no tensor '", name,
              "'; expected input_ids [n, S], attention_mask [n, S] and labels [n]");
  TORCH_CHECK(found->second.scalar_type() == at::kLong, path, ": '", name, "': expected int64, got ",
              found->second.dtype());
  return found->second;
}

// The first row for which `wrong` ([n] bool) holds, or -1.
int64_t first_row(const at::Tensor& wrong) {
  const at::Tensor rows = wrong.nonzero();
  return rows.size(0) == 0 ? -1 : rows[0].item<int64_t>();
}

void check_shapes(const Examples& examples, const std::string& path) {
  const at::Tensor& ids = examples.input_ids;
  TORCH_CHECK(ids.dim() == 2, path, ": 'input_ids': expected shape [n, S], got ", ids.sizes());
  TORCH_CHECK(examples.attention_mask.sizes() == ids.sizes(), path,
              ": 'attention_mask': expected the shape of input_ids, ", ids.sizes(), ", got ",
              examples.attention_mask.sizes());
  TORCH_CHECK(examples.labels.dim() == 1 && examples.labels.size(0) == ids.size(0), path,
              ": 'labels': expected one for each row of input_ids, [", ids.size(0), "], got ", examples.labels.sizes());
  TORCH_CHECK(ids.numel() > 0, path, ": holds no examples (input_ids of shape ", ids.sizes(), ")");
}

void check_values(const Examples& examples, const std::string& path, int64_t classes) {
  const at::Tensor& labels = examples.labels;
  const int64_t unlabelled = first_row(labels.lt(0).logical_or(labels.ge(classes)));
  if (unlabelled >= 0) {
    TORCH_CHECK(false, path, ": row ", unlabelled, ": label ", labels[unlabelled].item<int64_t>(),
                " is out of range for ", classes, " classes (0 to ", classes - 1, ")");
  }
  const int64_t negative = first_row(examples.input_ids.lt(0).any(1));
  TORCH_CHECK(negative < 0, path, ": row ", negative, ": input_ids has a negative token id");
  const int64_t empty = first_row(examples.attention_mask.ne(0).any(1).logical_not());
  TORCH_CHECK(empty < 0, path, ": row ", empty, ": attention_mask says that it has no tokens");
}

Examples select(const Examples& examples, const at::Tensor& indices) {
  return {examples.input_ids.index_select(0, indices), examples.attention_mask.index_select(0, indices),
          examples.labels.index_select(0, indices)};
}

}  // namespace

Examples Examples::rows(const at::Tensor& indices) const {
  Examples chosen = select(*this, indices);
  const int64_t tokens = chosen.attention_mask.ne(0).any(0).nonzero().max().item<int64_t>() + 1;
  chosen.input_ids = chosen.input_ids.narrow(1, 0, tokens).contiguous();
  chosen.attention_mask = chosen.attention_mask.narrow(1, 0, tokens).contiguous();
  return chosen;
}

Examples read_examples(const std::string& path, int64_t classes) {
  const torchgraft::StateDict tensors = torchgraft::read_safetensors(path, UINT64_MAX);
  Examples examples{take(tensors, path, "input_ids"), take(tensors, path, "attention_mask"),
                    take(tensors, path, "labels")};
  check_shapes(examples, path);
  check_values(examples, path, classes);
  return examples;
}

std::pair<Examples, Examples> split(const Examples& examples, double fraction, uint64_t seed) {
  const int64_t count = std::llround(fraction * static_cast<double>(examples.size()));
  TORCH_CHECK(count > 0 && count < examples.size(), "--validation-fraction ", fraction, " of ", examples.size(),
              " examples leaves one side of the split empty");
  const at::Tensor order =
      at::randperm(examples.size(), at::make_generator<at::CPUGeneratorImpl>(seed), at::TensorOptions(at::kLong));
  return {select(examples, order.narrow(0, count, examples.size() - count)),
          select(examples, order.narrow(0, 0, count))};
}

void check_every_class(const Examples& training, const std::vector<std::string>& labels) {
  std::string missing;
  for (size_t i = 0; i < labels.size(); ++i) {
    if (!training.labels.eq(static_cast<int64_t>(i)).any().item<bool>()) {
      missing += (missing.empty() ? "" : ", ") + labels[i];
    }
  }
  TORCH_CHECK(missing.empty(), "none of the ", training.size(), " training examples has the label ", missing,
              "; give more examples, another --seed for the split, or leave the class out");
}
