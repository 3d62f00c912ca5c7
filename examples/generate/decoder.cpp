#include "decoder.h"

#include <torchgraft/registration/error_text.h>

#include <torch/script.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace {

using c10::IValue;

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error(text); }

template <typename... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The tensors of a cache, in order.
void collect(const IValue& cache, std::vector<at::Tensor>& tensors) {
  if (cache.isTensor()) {
    tensors.push_back(cache.toTensor());
  } else if (cache.isTuple()) {
    for (const IValue& element : cache.toTupleRef().elements()) {
      collect(element, tensors);
    }
  } else if (cache.isList()) {
    for (const IValue& element : cache.toListRef()) {
      collect(element, tensors);
    }
  }
}

// [B, 1, S, P + S], 0 where a query sees a key: those before it that are no padding. A query of padding sees itself, so
// that its row of scores has a largest one.
at::Tensor additive_mask(const at::Tensor& real, int64_t tokens, at::ScalarType dtype) {
  const int64_t total = real.size(1);
  const at::Tensor causal = torch::ones({total, total}, torch::kBool).tril().slice(0, total - tokens);
  const at::Tensor itself = torch::eye(total, torch::kBool).slice(0, total - tokens);
  const at::Tensor seen = causal.logical_and(real.unsqueeze(1).unsqueeze(1)).logical_or(itself);
  const double hidden = dtype == at::kHalf ? -65504.0 : std::numeric_limits<float>::lowest() / 2;
  return torch::zeros(seen.sizes(), dtype).masked_fill_(seen.logical_not(), hidden);
}

}  // namespace

Decoder::Decoder(const std::string& path, const DecoderForm& form) : path_(path), form_(form) {
  if (!std::filesystem::is_regular_file(path)) {
    fail(path + ": no such file");
  }
  try {
    module_ = torch::jit::load(path, torch::kCPU);
  } catch (const c10::Error& error) {
    fail(path + ": not a TorchScript file that can be loaded: " + torchgraft::one_line(error));
  }
  module_.eval();
  dtype_ = at::kFloat;
  for (const at::Tensor& parameter : module_.parameters()) {
    if (parameter.is_floating_point()) {
      dtype_ = parameter.scalar_type();
      break;
    }
  }
  std::vector<c10::Argument> arguments = module_.get_method("forward").function().getSchema().arguments();
  arguments.erase(arguments.begin());  // self
  std::erase_if(arguments, [](const c10::Argument& argument) { return argument.name() == "adapter_ids"; });
  if (arguments.size() < 3) {
    fail(path + ": expected forward(ids, mask, [positions,] caches...), it takes " + std::to_string(arguments.size()) +
         " arguments; export the decoder with its caches (docs/generation.md)");
  }
  has_positions_ = arguments[2].name().find("position") != std::string::npos;
  caches_.assign(arguments.begin() + (has_positions_ ? 3 : 2), arguments.end());
  if (caches_.empty()) {
    fail(path + ": forward takes no cache of keys and values; export the decoder with one (docs/generation.md)");
  }
}

std::vector<std::string> Decoder::adapter_names() {
  std::vector<std::string> names;
  if (module_.find_method("adapter_names")) {
    const IValue list = module_.run_method("adapter_names");
    for (const IValue& name : list.toListRef()) {
      names.push_back(name.toStringRef());
    }
  }
  return names;
}

void Decoder::activate(const std::string& name) {
  if (!module_.find_method("activate")) {
    fail(path_ + ": the model has no adapters; graft some onto it with torchgraft add");
  }
  module_.run_method("activate", name);
}

IValue Decoder::empty_cache(const c10::TypePtr& type, int64_t rows) const {
  if (type->isSubtypeOf(*c10::TensorType::get())) {
    return torch::empty({rows, form_.heads, 0, form_.head_size}, dtype_);
  }
  if (const auto tuple = type->cast<c10::TupleType>()) {
    std::vector<IValue> elements;
    for (const c10::TypePtr& element : tuple->elements()) {
      elements.push_back(empty_cache(element, rows));
    }
    return c10::ivalue::Tuple::create(std::move(elements));
  }
  if (const auto list = type->cast<c10::ListType>()) {
    if (form_.layers <= 0) {
      fail("the cache is a list: say how long it is with --layers");
    }
    c10::impl::GenericList elements(list->getElementType());
    for (int64_t layer = 0; layer < form_.layers; ++layer) {
      elements.push_back(empty_cache(list->getElementType(), rows));
    }
    return elements;
  }
  fail(path_ + ": expected caches that are tensors, or tuples and lists of caches; forward takes " + type->repr_str());
}

Decoder::State Decoder::start(int64_t rows, const std::vector<int64_t>& adapter_ids) const {
  State state;
  state.real = torch::empty({rows, 0}, torch::kBool);
  for (const c10::Argument& cache : caches_) {
    state.caches.push_back(empty_cache(cache.type(), rows));
  }
  if (!adapter_ids.empty()) {
    if (static_cast<int64_t>(adapter_ids.size()) != rows) {
      fail(text_of("expected one adapter id for each of the ", rows, " prompts, got ", adapter_ids.size()));
    }
    if (!module_.find_method("adapter_names")) {
      fail(path_ + ": the model has no adapters, so sequences cannot choose among them");
    }
    state.adapter_ids = torch::tensor(adapter_ids, torch::kLong);
  }
  return state;
}

at::Tensor Decoder::step(State& state, const at::Tensor& ids, const at::Tensor& real) {
  const int64_t tokens = ids.size(1);
  const at::Tensor all = torch::cat({state.real, real}, 1);
  if (form_.max_positions > 0 && all.size(1) > form_.max_positions) {
    fail(text_of("expected at most ", form_.max_positions, " tokens, which the model has positions for, got ",
                 all.size(1)));
  }
  std::vector<IValue> inputs = {ids};
  inputs.emplace_back(form_.mask_of_tokens ? all.to(at::kLong) : additive_mask(all, tokens, dtype_));
  if (has_positions_) {
    inputs.emplace_back((all.to(at::kLong).cumsum(1) - 1).clamp_min(0).slice(1, all.size(1) - tokens));
  }
  inputs.insert(inputs.end(), state.caches.begin(), state.caches.end());
  torch::jit::Kwargs named;
  if (state.adapter_ids.defined()) {
    named["adapter_ids"] = state.adapter_ids;
  }
  const c10::InferenceMode no_gradients;
  IValue result;
  try {
    result = module_.get_method("forward")(std::move(inputs), named);
  } catch (const std::exception& error) {
    fail(text_of(path_, ": forward fails on ids ", ids.sizes(), " behind ", state.real.size(1),
                 " earlier tokens: ", torchgraft::one_line(error)));
  }
  if (!result.isTuple() || result.toTupleRef().elements().size() != 1 + caches_.size() ||
      !result.toTupleRef().elements()[0].isTensor()) {
    fail(text_of(path_, ": expected forward to give (logits, ", caches_.size(), " caches), got ",
                 result.type()->repr_str()));
  }
  const auto& elements = result.toTupleRef().elements();
  const at::Tensor logits = elements[0].toTensor();
  if (logits.dim() != 3 || logits.size(0) != ids.size(0) || logits.size(1) != tokens) {
    fail(text_of(path_, ": expected logits of shape [", ids.size(0), ", ", tokens, ", vocabulary], got ",
                 logits.sizes()));
  }
  state.caches.assign(elements.begin() + 1, elements.end());
  state.real = all;
  check_caches(state);
  return logits.select(1, tokens - 1);
}

void Decoder::check_caches(const State& state) const {
  const std::vector<int64_t> expected = {state.real.size(0), form_.heads, state.real.size(1), form_.head_size};
  for (size_t i = 0; i < caches_.size(); ++i) {
    std::vector<at::Tensor> tensors;
    collect(state.caches[i], tensors);
    for (const at::Tensor& tensor : tensors) {
      if (tensor.sizes() != at::IntArrayRef(expected) || tensor.scalar_type() != dtype_) {
        fail(text_of(path_, ": expected the cache '", caches_[i].name(), "' to be ", dtype_, " of shape ",
                     at::IntArrayRef(expected), ", got ", tensor.scalar_type(), " of shape ", tensor.sizes()));
      }
    }
  }
}
