#include "decoder.h"

#include <torchgraft/registration/error_text.h>
#include <torchgraft/registration/tensor_records.h>

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

// [B, 1, S, P + S], 0 where a query sees a key: those before it that are no padding. A query of padding sees itself, so
// that its row of scores has a largest one.
at::Tensor additive_mask(const at::Tensor& real, int64_t tokens, at::ScalarType dtype) {
  const int64_t total = real.size(1);
  const at::Tensor keys = torch::arange(total);
  const at::Tensor queries = torch::arange(total - tokens, total).unsqueeze(1);
  const at::Tensor seen =
      keys.less_equal(queries).logical_and(real.unsqueeze(1).unsqueeze(1)).logical_or(keys.eq(queries));
  const double hidden = dtype == at::kHalf ? -65504.0 : std::numeric_limits<float>::lowest() / 2;
  return torch::zeros(seen.sizes(), dtype).masked_fill_(seen.logical_not(), hidden);
}

}  // namespace

bool takes_positions(const torch::jit::Module& module) {
  const auto& arguments = module.get_method("forward").function().getSchema().arguments();
  return arguments.size() > 3 && arguments[3].name().find("position") != std::string::npos;
}

torch::jit::Module load_decoder(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) {
    fail(path + ": no such file");
  }
  try {
    torchgraft::check_tensor_records(path);
    torch::jit::Module module = torch::jit::load(path, torch::kCPU);
    module.eval();
    return module;
  } catch (const std::exception& error) {
    fail(path + ": not a TorchScript file that can be loaded: " + torchgraft::one_line(error));
  }
}

Decoder::Decoder(const torch::jit::Module& module, std::string name, const DecoderForm& form)
    : module_(module), name_(std::move(name)), form_(form), dtype_(at::kFloat) {
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
    fail(name_ + ": expected forward(ids, mask, [positions,] caches...), it takes " + std::to_string(arguments.size()) +
         " arguments; export the decoder with its caches (docs/generation.md)");
  }
  has_positions_ = takes_positions(module_);
  caches_.assign(arguments.begin() + (has_positions_ ? 3 : 2), arguments.end());
  if (caches_.empty()) {
    fail(name_ + ": forward takes no cache of keys and values; export the decoder with one (docs/generation.md)");
  }
  if (bytes_per_token() == 0) {
    fail(text_of(name_, ": expected caches that hold keys and values, got none, of ", form_.heads, " heads of ",
                 form_.head_size));
  }
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
      fail(name_ + ": the cache is a list: say how long it is with --layers");
    }
    c10::impl::GenericList elements(list->getElementType());
    for (int64_t layer = 0; layer < form_.layers; ++layer) {
      elements.push_back(empty_cache(list->getElementType(), rows));
    }
    return elements;
  }
  fail(name_ + ": expected caches that are tensors, or tuples and lists of caches; forward takes " + type->repr_str());
}

DecoderState Decoder::start(int64_t rows, const std::vector<int64_t>& adapter_ids) const {
  DecoderState state;
  state.real = torch::empty({rows, 0}, torch::kBool);
  for (const c10::Argument& cache : caches_) {
    state.caches.push_back(empty_cache(cache.type(), rows));
  }
  if (!adapter_ids.empty()) {
    if (static_cast<int64_t>(adapter_ids.size()) != rows) {
      fail(text_of("expected one adapter id for each of the ", rows, " prompts, got ", adapter_ids.size()));
    }
    if (!module_.find_method("adapter_names")) {
      fail(name_ + ": the model has no adapters, so sequences cannot choose among them");
    }
    state.adapter_ids = torch::tensor(adapter_ids, torch::kLong);
  }
  return state;
}

int64_t Decoder::bytes_per_token() const {
  int64_t tensors = 0;
  for (const c10::Argument& cache : caches_) {
    tensors += static_cast<int64_t>(tensors_of(empty_cache(cache.type(), 1)).size());
  }
  return tensors * form_.heads * form_.head_size * static_cast<int64_t>(c10::elementSize(dtype_));
}

void Decoder::try_out() const {
  const int64_t prompt = form_.max_positions > 0 ? std::clamp<int64_t>(form_.max_positions - 1, 1, 3) : 3;
  try {
    DecoderState state = start(2, {});
    for (const int64_t tokens : {prompt, int64_t{1}}) {
      const at::Tensor ids = torch::zeros({2, tokens}, torch::kLong);
      step(state, ids, torch::ones_like(ids, torch::kBool));
    }
  } catch (const std::exception& error) {
    fail(text_of(error.what(), ". Tried with ", form_.heads, " heads (--heads), heads of ", form_.head_size,
                 " (--head-size), lists of ", form_.layers, " (--layers), and ",
                 form_.mask_of_tokens ? "a mask of tokens (without --mask-of-tokens: one that is added to the scores)"
                                      : "a mask that is added to the scores (--mask-of-tokens: one of tokens)"));
  }
}

at::Tensor Decoder::step(DecoderState& state, const at::Tensor& ids, const at::Tensor& real) const {
  const c10::InferenceMode no_gradients;
  const int64_t tokens = ids.size(1);
  DecoderState next;
  next.real = torch::cat({state.real, real}, 1);
  next.adapter_ids = state.adapter_ids;
  check_positions(next.real);
  std::vector<IValue> inputs = {ids};
  inputs.emplace_back(form_.mask_of_tokens ? next.real.to(at::kLong) : additive_mask(next.real, tokens, dtype_));
  if (has_positions_) {
    inputs.emplace_back((next.real.to(at::kLong).cumsum(1) - 1).clamp_min(0).slice(1, state.tokens()));
  }
  inputs.insert(inputs.end(), state.caches.begin(), state.caches.end());
  torch::jit::Kwargs named;
  if (state.adapter_ids.defined()) {
    named["adapter_ids"] = state.adapter_ids;
  }
  IValue result;
  try {
    result = module_.get_method("forward")(std::move(inputs), named);
  } catch (const std::exception& error) {
    fail(text_of(name_, ": forward fails on ids ", ids.sizes(), " behind ", state.tokens(),
                 " earlier tokens: ", torchgraft::one_line(error)));
  }
  check_result(result, ids);
  const auto& elements = result.toTupleRef().elements();
  next.caches.assign(elements.begin() + 1, elements.end());
  check_caches(next);
  state = std::move(next);
  return elements[0].toTensor().select(1, tokens - 1);
}

void Decoder::check_positions(const at::Tensor& real) const {
  if (!has_positions_) {
    // A sequence that has ended goes on as padding: nobody reads what is written behind it.
    const at::Tensor lengths = real.sum(1).masked_select(real.select(1, real.size(1) - 1));
    const int64_t shortest = lengths.numel() > 0 ? lengths.min().item<int64_t>() : real.size(1);
    if (shortest < real.size(1)) {
      fail(text_of(name_,
                   ": forward takes no positions, so it would count padding: expected prompts of one length, got ",
                   shortest, " and ", real.size(1),
                   " tokens; continue those of each length by themselves, or export the decoder with an argument "
                   "'positions' (docs/generation.md)"));
    }
  }
  if (form_.max_positions > 0) {
    const auto longest = real.sum(1).max().item<int64_t>();
    if (longest > form_.max_positions) {
      fail(text_of("expected at most ", form_.max_positions, " tokens, which the model has positions for, got ",
                   longest));
    }
  }
}

void Decoder::check_result(const IValue& result, const at::Tensor& ids) const {
  if (!result.isTuple() || result.toTupleRef().elements().size() != 1 + caches_.size() ||
      !result.toTupleRef().elements()[0].isTensor()) {
    fail(text_of(name_, ": expected forward to give (logits, ", caches_.size(), " caches), got ",
                 result.type()->repr_str()));
  }
  const at::Tensor logits = result.toTupleRef().elements()[0].toTensor();
  if (logits.dim() != 3 || logits.size(0) != ids.size(0) || logits.size(1) != ids.size(1)) {
    fail(text_of(name_, ": expected logits of shape [", ids.size(0), ", ", ids.size(1), ", vocabulary], got ",
                 logits.sizes()));
  }
}

void Decoder::check_caches(const DecoderState& state) const {
  const std::vector<int64_t> expected = {state.rows(), form_.heads, state.tokens(), form_.head_size};
  for (size_t i = 0; i < caches_.size(); ++i) {
    const size_t count = tensors_of(empty_cache(caches_[i].type(), 0)).size();
    const std::vector<at::Tensor> tensors = tensors_of(state.caches[i]);
    if (tensors.size() != count) {
      fail(text_of(name_, ": expected the cache '", caches_[i].name(), "' to hold ", count, " tensors, got ",
                   tensors.size()));
    }
    for (const at::Tensor& tensor : tensors) {
      if (tensor.sizes() != at::IntArrayRef(expected) || tensor.scalar_type() != dtype_) {
        fail(text_of(name_, ": expected the cache '", caches_[i].name(), "' to be ", dtype_, " of shape ",
                     at::IntArrayRef(expected), ", got ", tensor.scalar_type(), " of shape ", tensor.sizes()));
      }
    }
  }
}
