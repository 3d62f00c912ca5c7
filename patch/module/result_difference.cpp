#include <torchgraft/patch/module/result_difference.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <sstream>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// How far two orders of the same arithmetic may lie apart, relative to the size of the numbers.
double relative_tolerance(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
    case at::kComplexDouble:
      return 1e-5;  // such models often take their softmax in float32
    case at::kFloat:
    case at::kComplexFloat:
      return 1e-4;
    default:
      return 0.1;  // 16-bit numbers, and what was rounded to integers on the way
  }
}

at::ScalarType coarser(at::ScalarType a, at::ScalarType b) {
  return relative_tolerance(a) < relative_tolerance(b) ? b : a;
}

bool is_16_bit(const std::optional<c10::IValue>& dtype) {
  return dtype && dtype->isInt() &&
         (dtype->toInt() == static_cast<int64_t>(at::kHalf) || dtype->toInt() == static_cast<int64_t>(at::kBFloat16));
}

// The numbers of `tensor` in float64; undefined when it has none that can be compared.
at::Tensor numbers(at::Tensor tensor) {
  if (!tensor.defined() || tensor.is_nested() || tensor.is_mkldnn()) {
    return {};
  }
  if (tensor.is_quantized()) {
    tensor = tensor.dequantize();
  }
  if (tensor.layout() != at::kStrided) {
    tensor = tensor.to_dense();
  }
  if (at::isComplexType(tensor.scalar_type())) {
    tensor = at::view_as_real(tensor.resolve_conj());
  }
  return at::isFloatingType(tensor.scalar_type()) && tensor.numel() > 0 ? tensor.to(at::kDouble) : at::Tensor();
}

bool is_whole(const at::Tensor& tensor) {
  return tensor.defined() && at::isIntegralType(tensor.scalar_type(), /*includeBool=*/true) && !tensor.is_nested() &&
         tensor.layout() == at::kStrided;
}

bool have_same_form(const at::Tensor& a, const at::Tensor& b) {
  if (!a.defined() || !b.defined()) {
    return a.defined() == b.defined();
  }
  const bool are_nested = a.is_nested() || b.is_nested();
  return a.scalar_type() == b.scalar_type() && a.layout() == b.layout() && a.is_nested() == b.is_nested() &&
         (are_nested || a.sizes() == b.sizes());
}

// Whether `holds` for the numbers of every tensor in `value`.
bool every_tensor(const c10::IValue& value, const std::function<bool(const at::Tensor&)>& holds) {
  bool result = true;
  value.visit([&](const c10::IValue& part) {
    const at::Tensor tensor = part.isTensor() ? numbers(part.toTensor()) : at::Tensor();
    result = result && (!tensor.defined() || holds(tensor));
    return false;
  });
  return result;
}

// The largest of the usual numbers among `sizes` (absolute values, any shape). Numbers beyond a gap of three orders of
// magnitude are not usual.
double usual_size(const at::Tensor& sizes) {
  constexpr double kGap = 1e3;
  constexpr double kSmall = 1e-2;  // gaps among numbers near zero mean nothing
  const at::Tensor sorted = std::get<0>(sizes.flatten().cpu().sort());
  const auto* begin = sorted.const_data_ptr<double>();
  const auto* end = begin + sorted.numel();
  const auto* gap =
      std::adjacent_find(begin, end, [](double lower, double upper) { return lower > kSmall && upper > kGap * lower; });
  return gap == end ? *(end - 1) : *gap;
}

}  // namespace

at::ScalarType coarsest_dtype(Graph& graph, const Module& module) {
  at::ScalarType result = at::kDouble;
  const auto weaken = [&](const at::Tensor& tensor) {
    if (tensor.defined() && at::isFloatingType(tensor.scalar_type())) {
      result = coarser(result, tensor.scalar_type());
    }
  };
  for (const at::Tensor& parameter : module.parameters()) {
    weaken(parameter);
  }
  for_each_node(graph.block(), [&](Node* node) {
    const std::string kind = node->kind().toQualString();
    if (kind.find("quantize") != std::string::npos || kind.find("autocast") != std::string::npos) {
      result = coarser(result, at::kHalf);
    }
    for (const Value* input : node->inputs()) {
      const auto constant = input->node()->kind() == c10::prim::Constant ? resolve_constant(input) : std::nullopt;
      if (constant && constant->isTensor()) {
        weaken(constant->toTensor());
      }
      if (is_aten(node, {"to"}) && is_16_bit(constant)) {
        result = coarser(result, at::kHalf);
      }
    }
  });
  return result;
}

ResultDifference::ResultDifference(at::ScalarType dtype, const c10::IValue& expected, const c10::IValue& actual)
    : coarsest_(dtype) {
  add(expected, actual);
}

std::string ResultDifference::text() const {
  if (structure_differs_) {
    return "by its structure, a shape or a dtype";
  }
  if (is_of_integers_only()) {
    return "in its integers or booleans";
  }
  std::ostringstream result;
  result << "by " << difference_ << " (at most " << allowed_ << " is rounding)";
  return result.str();
}

std::string ResultDifference::not_compared() const {
  if (is_of_integers_only()) {
    return "its integers or booleans differ, which rounding may do";
  }
  return has_compared_ ? "" : "it holds no numbers";
}

void ResultDifference::add(const c10::IValue& expected, const c10::IValue& actual) {
  if (expected.tagKind() != actual.tagKind()) {
    structure_differs_ = true;
  } else if (expected.isTensor()) {
    add_tensors(expected.toTensor(), actual.toTensor());
  } else if (expected.isTuple()) {
    add_all(expected.toTupleRef().elements().vec(), actual.toTupleRef().elements().vec());
  } else if (expected.isList()) {
    add_all(expected.toListRef().vec(), actual.toListRef().vec());
  } else if (expected.isGenericDict()) {
    const auto others = actual.toGenericDict();
    structure_differs_ = structure_differs_ || expected.toGenericDict().size() != others.size();
    for (const auto& entry : expected.toGenericDict()) {
      const auto other = others.find(entry.key());
      other == others.end() ? void(structure_differs_ = true) : add(entry.value(), other->value());
    }
  }
}

void ResultDifference::add_all(const std::vector<c10::IValue>& expected, const std::vector<c10::IValue>& actual) {
  structure_differs_ = structure_differs_ || expected.size() != actual.size();
  for (size_t i = 0; i < std::min(expected.size(), actual.size()); ++i) {
    add(expected[i], actual[i]);
  }
}

void ResultDifference::add_tensors(const at::Tensor& expected, const at::Tensor& actual) {
  if (!have_same_form(expected, actual)) {
    structure_differs_ = true;
  } else if (is_whole(expected)) {
    has_compared_ = true;
    integers_differ_ = integers_differ_ || !at::equal(expected, actual);
  } else {
    const at::ScalarType dtype = expected.defined() ? expected.scalar_type() : coarsest_;
    add_numbers(numbers(expected), numbers(actual), relative_tolerance(coarser(coarsest_, dtype)));
  }
}

void ResultDifference::add_numbers(const at::Tensor& wanted, const at::Tensor& got, double tolerance) {
  if (!wanted.defined()) {
    return;
  }
  has_compared_ = true;
  const at::Tensor finite = wanted.isfinite();
  const at::Tensor same = wanted.eq(got).logical_or(wanted.isnan().logical_and(got.isnan()));
  if (finite.logical_or(same).logical_not().any().item<bool>()) {  // an infinity or NaN of one of the two only
    excess_ = difference_ = kInfinity;
    return;
  }
  const at::Tensor sizes = wanted.abs().masked_select(finite);
  if (sizes.numel() == 0) {
    return;
  }
  const double least = std::max(usual_size(sizes), 1e-3);
  const at::Tensor allowed = sizes.clamp_min(least) * tolerance;
  const at::Tensor difference = (wanted - got).abs().masked_select(finite).nan_to_num(kInfinity, kInfinity);
  const auto [excess, worst] = (difference / allowed).max(/*dim=*/0);
  if (excess.item<double>() >= excess_) {
    excess_ = excess.item<double>();
    difference_ = difference[worst].item<double>();
    allowed_ = allowed[worst].item<double>();
  }
}

std::optional<std::string> explained_by_rounding(const ResultDifference& difference, at::ScalarType dtype,
                                                 const std::function<ResultDifference()>& in_double) {
  if (!difference.is_too_large()) {
    return difference.not_compared();
  }
  if (dtype == at::kDouble || difference.is_of_structure()) {
    return std::nullopt;
  }
  try {
    return in_double().is_too_large() ? std::nullopt : std::optional<std::string>("");
  } catch (const std::exception&) {
    return difference.is_of_integers_only() ? std::optional(difference.not_compared()) : std::nullopt;
  }
}

bool all_finite(const c10::IValue& value) {
  return every_tensor(value, [](const at::Tensor& tensor) { return tensor.isfinite().all().item<bool>(); });
}

bool has_nan(const c10::IValue& value) {
  return !every_tensor(value, [](const at::Tensor& tensor) { return !tensor.isnan().any().item<bool>(); });
}

}  // namespace torchgraft
