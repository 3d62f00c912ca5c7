#include <torchgraft/patch/module/row_counts.h>

#include <ATen/ATen.h>

#include <algorithm>

namespace torchgraft {
namespace {

void add_size(std::vector<int64_t>& sizes, int64_t size) {
  if (size > 0 && std::find(sizes.begin(), sizes.end(), size) == sizes.end()) {
    sizes.push_back(size);
  }
}

}  // namespace

std::vector<int64_t> row_counts(const Arguments& arguments) {
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> lengths;
  for (const c10::IValue& argument : arguments) {
    argument.visit([&](const c10::IValue& part) {
      if (part.isTensor() && part.toTensor().defined() && !part.toTensor().is_nested()) {
        tensors.push_back(part.toTensor());
      } else if (part.isList()) {
        lengths.push_back(static_cast<int64_t>(part.toListRef().size()));
      }
      return false;
    });
  }
  std::vector<int64_t> result;
  for (const int64_t dimension : {0, 1}) {
    for (const at::Tensor& tensor : tensors) {
      add_size(result, tensor.dim() > dimension ? tensor.size(dimension) : 0);
    }
  }
  for (const int64_t length : lengths) {
    add_size(result, length);
  }
  add_size(result, 1);
  for (const at::Tensor& tensor : tensors) {
    for (int64_t dimension = 0; dimension + 1 < tensor.dim(); ++dimension) {
      add_size(result, tensor.size(dimension) * tensor.size(dimension + 1));
    }
    add_size(result, tensor.dim() > 2 ? tensor.size(2) : 0);
    add_size(result, tensor.dim() > 0 ? 2 * tensor.size(0) : 0);
  }
  return result;
}

}  // namespace torchgraft
