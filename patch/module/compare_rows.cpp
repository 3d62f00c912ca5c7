#include <torchgraft/patch/module/compare_rows.h>

#include <ATen/ATen.h>

#include <vector>

namespace torchgraft {
namespace {

constexpr double kNoise = 1e-3;  // of what the adapter changes: less is rounding

double largest(const at::Tensor& tensor) { return tensor.numel() == 0 ? 0.0 : tensor.abs().max().item<double>(); }

// Whether along `dim` rows other than the first have changed, and the first has not.
bool changes_others(const at::Tensor& change, int64_t dim, double noise) {
  const double of_first = largest(change.narrow(dim, 0, 1));
  const double of_others = largest(change.narrow(dim, 1, change.size(dim) - 1));
  return of_first <= noise && of_others > noise;
}

bool moves_rows_of(const at::Tensor& of_base, const at::Tensor& of_adapter, const at::Tensor& of_row, int64_t rows) {
  if (of_base.sizes() != of_adapter.sizes() || of_base.sizes() != of_row.sizes()) {
    return false;
  }
  const double noise = kNoise * largest(of_adapter - of_base);
  const at::Tensor change = of_row - of_base;
  bool is_moved = false;
  for (int64_t dim = 0; dim < change.dim(); ++dim) {
    if (change.size(dim) == rows) {
      if (!changes_others(change, dim, noise)) {
        return false;
      }
      is_moved = true;
    }
  }
  return is_moved;
}

}  // namespace

std::vector<at::Tensor> tensors_in(const c10::IValue& result) {
  std::vector<at::Tensor> found;
  result.visit([&](const c10::IValue& part) {
    if (part.isTensor() && part.toTensor().defined() && !part.toTensor().is_nested() &&
        part.toTensor().is_floating_point()) {
      found.push_back(part.toTensor().detach().to(at::kDouble));
    }
    return false;
  });
  return found;
}

bool moves_rows(const c10::IValue& of_base, const c10::IValue& of_adapter, const c10::IValue& of_row, int64_t rows) {
  const std::vector<at::Tensor> base = tensors_in(of_base);
  const std::vector<at::Tensor> adapter = tensors_in(of_adapter);
  const std::vector<at::Tensor> row = tensors_in(of_row);
  if (rows < 2 || base.size() != adapter.size() || base.size() != row.size()) {
    return false;
  }
  for (size_t i = 0; i < base.size(); ++i) {
    if (moves_rows_of(base[i], adapter[i], row[i], rows)) {
      return true;
    }
  }
  return false;
}

std::vector<at::Tensor> with_first_repeated(const c10::IValue& of_base, const c10::IValue& of_adapter,
                                            std::vector<at::Tensor>& of_row, int64_t rows, int64_t channels) {
  const std::vector<at::Tensor> base = tensors_in(of_base);
  const std::vector<at::Tensor> adapter = tensors_in(of_adapter);
  std::vector<at::Tensor> expected;
  std::vector<at::Tensor> actual;
  for (size_t i = 0; i < base.size() && base.size() == adapter.size() && base.size() == of_row.size(); ++i) {
    std::vector<int64_t> dims;
    for (int64_t dim = 0; dim < base[i].dim() && base[i].dim() == adapter[i].dim(); ++dim) {
      if (base[i].size(dim) == rows && adapter[i].size(dim) == rows * channels) {
        dims.push_back(dim);
      }
    }
    if (dims.size() != 1) {
      continue;
    }
    std::vector<at::Tensor> parts = {adapter[i].narrow(dims[0], 0, 1), base[i].narrow(dims[0], 1, rows - 1)};
    for (int64_t channel = 1; channel < channels; ++channel) {
      parts.push_back(adapter[i].narrow(dims[0], channel * rows, 1));
    }
    expected.push_back(at::cat(parts, dims[0]));
    actual.push_back(of_row[i]);
  }
  of_row = actual;
  return expected;
}

}  // namespace torchgraft
