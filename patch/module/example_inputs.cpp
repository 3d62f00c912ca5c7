#include <torchgraft/patch/module/example_inputs.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>

namespace torchgraft {
namespace {

using c10::Argument;
using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Use;
using torch::jit::Value;

constexpr int64_t kBatch = 2;
constexpr int64_t kTokens = 7;
constexpr int64_t kPadding = 2;        // tokens
constexpr double kHidden = -1e4;       // leaves no probability in any dtype
constexpr int64_t kUsualPatches = 14;  // 224 pixels in patches of 16
constexpr int64_t kMostPatches = 64;   // 1024 pixels in patches of 16; larger tables are those of words
constexpr int64_t kDecoderTokens = 5;  // another length shows which argument a mask belongs to

enum class Kind { kDefault, kMask, kIds, kStates, kImages, kUnknown };

struct Input {
  Kind kind = Kind::kUnknown;
  bool is_decoders = false;
  bool is_key_padding = false;  // of kMask: PyTorch's key_padding_mask, whose form is known
  bool is_memorys = false;      // of kMask: the decoder's queries see the encoder's keys
  int64_t size = 0;             // of kIds: the embedding's rows; of kStates: the features; of kImages: the channels
  int64_t stride = 0;           // of kImages: the width of a patch
  std::optional<c10::IValue> standard;  // the default value
};

enum class MaskShape { kTokens, kKeys, kScores, kPairs };  // [B, S], [B, 1, 1, S], [B, 1, S, S], [S, S]

struct MaskForm {
  at::ScalarType dtype;
  MaskShape shape = MaskShape::kTokens;
  bool is_added = false;     // to the scores: 0 where a token is real, kHidden elsewhere; else 1 and 0
  bool is_inverted = false;  // 0 where a token is real, 1 elsewhere, as PyTorch's key_padding_mask
};

// What one candidate tries.
struct Attempt {
  std::optional<MaskForm> masks;  // none: masks keep their default
  bool one_length = false;        // of the encoder's and the decoder's tokens
  bool sequence_first = false;    // hidden states are [S, B, features]
  int64_t patches = 0;            // along each side of an image
};

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

std::vector<int64_t> constant_ints(const Value* value) {
  const auto constant = resolve_constant(value);
  if (constant && constant->isIntList()) {
    return constant->toIntVector();
  }
  std::vector<int64_t> result;
  if (value->node()->kind() == c10::prim::ListConstruct) {
    for (const Value* element : value->node()->inputs()) {
      const auto number = constant_int(element);
      if (!number) {
        return {};
      }
      result.push_back(*number);
    }
  }
  return result;
}

// The sizes of the weight that a linear map or an embedding reads; empty when they are not known.
std::vector<int64_t> weight_sizes(const Value* weight, const Module& module) {
  const WeightSource source = weight_source(weight, module);
  if (const auto packed = source.packed ? packed_weight(source.packed) : std::nullopt) {
    return {packed->rows, packed->columns};
  }
  return source.tensor.defined() ? source.tensor.sizes().vec() : std::vector<int64_t>();
}

// The weight of an embedding whose indices are `value`; null for another node.
const Value* embedding_weight(Node* node, const Value* value) {
  const bool is_packed = node->kind() == c10::Symbol::fromQualString("quantized::embedding_byte") ||
                         node->kind() == c10::Symbol::fromQualString("quantized::embedding_4bit");
  const bool reads = (is_packed || is_aten(node, {"embedding"})) && node->namedInput("indices") == value;
  return reads ? node->namedInput("weight") : nullptr;
}

// read_use of what cat or stack make of the tensors in `list`.
bool read_list_use(const Value* list, const Module& module, Input& input, std::set<const Value*>& seen);

// The first user of `value`, seen through casts, views and arithmetic, that says what the value is: an embedding that
// it indexes, or a linear map, a norm that reads it. Fills in `input`.
bool read_use(const Value* value, const Module& module, Input& input, std::set<const Value*>& seen) {
  if (!seen.insert(value).second) {
    return false;
  }
  for (const Use& use : value->uses()) {
    Node* user = use.user;
    const Value* indexed = embedding_weight(user, value);
    if (indexed || (is_linear(user) && linear_input(user) == value)) {
      const auto sizes = weight_sizes(indexed ? indexed : linear_weight(user), module);
      if (sizes.empty()) {
        continue;
      }
      input.kind = indexed ? Kind::kIds : Kind::kStates;
      input.size = indexed ? sizes.front() : sizes.back();
      return true;
    }
    if (is_aten(user, {"conv2d", "_convolution"}) && user->namedInput("input") == value) {
      const at::Tensor weight = resolve_tensor(user->namedInput("weight"), module);
      const auto stride = constant_ints(user->namedInput("stride"));
      if (weight.defined() && weight.dim() == 4 && !stride.empty()) {
        input.kind = Kind::kImages;
        input.size = weight.size(1);
        input.stride = stride.front();
        return true;
      }
    }
    const bool is_norm = is_aten(user, {"layer_norm"}) && user->namedInput("input") == value;
    if (is_norm && !is_none(user->namedInput("weight"))) {
      const at::Tensor weight = resolve_tensor(user->namedInput("weight"), module);
      if (weight.defined()) {
        input.kind = Kind::kStates;
        input.size = weight.size(0);
        return true;
      }
    }
  }
  for (const Use& use : value->uses()) {
    if (use.user->kind() == c10::prim::ListConstruct && read_list_use(use.user->output(), module, input, seen)) {
      return true;
    }
    const bool carries =
        is_layout(use.user) || is_elementwise(use.user) ||
        is_aten(use.user, {"to", "long", "int", "add", "mul", "clamp", "slice", "scaled_dot_product_attention"});
    if (carries && !use.user->outputs().empty() && is_tensor(use.user->output()) &&
        read_use(use.user->output(), module, input, seen)) {
      return true;
    }
  }
  return false;
}

bool read_list_use(const Value* list, const Module& module, Input& input, std::set<const Value*>& seen) {
  return std::any_of(list->uses().begin(), list->uses().end(), [&](const Use& use) {
    return is_aten(use.user, {"cat", "stack"}) && read_use(use.user->output(), module, input, seen);
  });
}

Input describe(const Argument& argument, const Value* value, const Module& module) {
  Input input;
  input.standard = argument.default_value();
  input.is_decoders = contains(argument.name(), "decoder") || contains(argument.name(), "tgt");
  if (!argument.type()->isSubtypeOf(*c10::OptionalType::ofTensor())) {
    input.kind = input.standard ? Kind::kDefault : Kind::kUnknown;
    return input;
  }
  if (contains(argument.name(), "mask")) {
    input.kind = Kind::kMask;
    input.is_key_padding = contains(argument.name(), "key_padding_mask");
    input.is_memorys = contains(argument.name(), "memory");
    return input;
  }
  if (input.standard) {
    input.kind = Kind::kDefault;
    return input;
  }
  std::set<const Value*> seen;
  read_use(value, module, input, seen);
  return input;
}

class Drawing {
 public:
  explicit Drawing(const at::TensorOptions& dtype)
      : states_(dtype), generator_(at::make_generator<at::CPUGeneratorImpl>(1)) {}

  // The last row ends in 0, which is what models usually pad with.
  at::Tensor ids(int64_t rows, at::IntArrayRef shape) const {
    const at::Tensor result = at::randint(rows, shape, generator_, at::kLong);
    if (shape.size() == 2 && shape[0] > 0 && shape[1] > kPadding) {
      result[-1].slice(0, shape[1] - kPadding).zero_();
    }
    return result.to(states_.device());
  }

  at::Tensor states(at::IntArrayRef shape, at::ScalarType dtype) const {
    return at::randn(shape, generator_, at::TensorOptions(at::kFloat)).to(states_.device(), dtype);
  }

  // Real tokens are 1; the last row ends in two tokens of padding.
  at::Tensor mask(int64_t rows, int64_t tokens, const MaskForm& form) const {
    at::Tensor result = at::ones({rows, tokens}, states_.dtype(at::kLong));
    if (rows > 0 && tokens > kPadding) {
      result[-1].slice(0, tokens - kPadding).zero_();
    }
    if (form.shape != MaskShape::kTokens) {
      const int64_t queries = form.shape == MaskShape::kScores ? tokens : 1;
      result = result.view({rows, 1, 1, tokens}).expand({rows, 1, queries, tokens}).contiguous();
    }
    if (form.is_added) {
      return at::zeros(result.sizes(), states_.dtype(form.dtype)).masked_fill_(result == 0, kHidden);
    }
    return (form.is_inverted ? 1 - result : result).to(form.dtype);
  }

  // Added to the scores of all rows: each token sees those before it, if queries and keys are the same tokens.
  at::Tensor pairs(int64_t queries, int64_t keys, at::ScalarType dtype) const {
    const at::Tensor result = at::zeros({queries, keys}, states_.dtype(dtype));
    return queries == keys ? result.masked_fill_(at::ones_like(result, at::kBool).triu(1), kHidden) : result;
  }

  at::Tensor ones(at::IntArrayRef shape, at::ScalarType dtype) const { return at::ones(shape, states_.dtype(dtype)); }

  at::ScalarType dtype() const { return c10::typeMetaToScalarType(states_.dtype()); }

 private:
  at::TensorOptions states_;
  mutable at::Generator generator_;
};

at::Tensor draw_mask(const Input& input, const Attempt& attempt, int64_t tokens, const Drawing& drawing) {
  if (input.is_key_padding) {
    return drawing.mask(kBatch, tokens, {at::kBool, MaskShape::kTokens, false, true});
  }
  if (attempt.masks->shape == MaskShape::kPairs) {
    return drawing.pairs(input.is_memorys && !attempt.one_length ? kDecoderTokens : tokens, tokens,
                         attempt.masks->dtype);
  }
  return drawing.mask(kBatch, tokens, *attempt.masks);
}

std::vector<c10::IValue> draw(const std::vector<Input>& inputs, const Attempt& attempt, const Drawing& drawing) {
  std::vector<c10::IValue> result;
  for (const Input& input : inputs) {
    const int64_t tokens = input.is_decoders && !attempt.one_length ? kDecoderTokens : kTokens;
    if (input.kind == Kind::kIds) {
      result.emplace_back(drawing.ids(input.size, {kBatch, tokens}));
    } else if (input.kind == Kind::kStates && attempt.sequence_first) {
      result.emplace_back(drawing.states({tokens, kBatch, input.size}, drawing.dtype()));
    } else if (input.kind == Kind::kStates) {
      result.emplace_back(drawing.states({kBatch, tokens, input.size}, drawing.dtype()));
    } else if (input.kind == Kind::kImages) {
      const int64_t side = input.stride * attempt.patches;
      result.emplace_back(drawing.states({kBatch, input.size, side, side}, drawing.dtype()));
    } else if (input.kind == Kind::kMask && attempt.masks) {
      result.emplace_back(draw_mask(input, attempt, tokens, drawing));
    } else {
      result.push_back(*input.standard);
    }
  }
  return result;
}

// How many patches an image may have along each side: where a parameter has a row for each patch, and perhaps one or
// two for other tokens, it holds the positions.
std::vector<int64_t> patches_along(const Module& module) {
  std::set<int64_t> result;
  for (const at::Tensor& parameter : module.parameters()) {
    for (const int64_t rows : parameter.sizes().slice(0, parameter.dim() > 1 ? parameter.dim() - 1 : 0)) {
      for (const int64_t others : {0, 1, 2}) {
        const auto side = static_cast<int64_t>(std::lround(std::sqrt(std::max<int64_t>(rows - others, 0))));
        if (side > 1 && side <= kMostPatches && side * side == rows - others) {
          result.insert(side);
        }
      }
    }
  }
  result.insert(kUsualPatches);
  return {result.begin(), result.end()};
}

// The arguments with which the graph was traced; nullopt when it has no shapes, as after loading.
std::optional<std::vector<c10::IValue>> traced_arguments(const std::vector<Input>& inputs, const Graph& graph,
                                                         bool inverts_masks, const Drawing& drawing) {
  std::vector<c10::IValue> result;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto type = graph.inputs()[i + 1]->type()->cast<c10::TensorType>();
    const auto shape = type ? type->sizes().concrete_sizes() : std::nullopt;
    if (!shape || !type->scalarType()) {
      return std::nullopt;
    }
    const at::ScalarType dtype = *type->scalarType();
    if (inputs[i].kind == Kind::kIds) {
      result.emplace_back(drawing.ids(inputs[i].size, *shape).to(dtype));
    } else if (inputs[i].kind == Kind::kMask && shape->size() == 2) {
      result.emplace_back(drawing.mask((*shape)[0], (*shape)[1], {dtype, MaskShape::kTokens, false, inverts_masks}));
    } else if (at::isFloatingType(dtype) && inputs[i].kind != Kind::kMask) {
      result.emplace_back(drawing.states(*shape, dtype));
    } else {
      result.emplace_back(drawing.ones(*shape, dtype));
    }
  }
  return result;
}

// What an example without masks leaves untried.
std::string untried(const std::vector<std::string>& masks) {
  std::string names;
  for (const std::string& name : masks) {
    names += (names.empty() ? "'" : ", '") + name + "'";
  }
  return "the result was compared with the base's without " + names +
         ", whose form is not known; give example inputs to compare it, too";
}

// What to try, apart from masks.
std::vector<Attempt> attempts_at(const std::vector<Input>& inputs, const Module& module) {
  const auto any = [&](auto holds) { return std::any_of(inputs.begin(), inputs.end(), holds); };
  const bool has_images = any([](const Input& input) { return input.kind == Kind::kImages; });
  const bool has_states = any([](const Input& input) { return input.kind == Kind::kStates; });
  const bool has_decoder = any([](const Input& input) { return input.is_decoders; });
  std::vector<Attempt> result;
  for (const int64_t patches : has_images ? patches_along(module) : std::vector<int64_t>{0}) {
    for (const bool sequence_first : {false, true}) {
      for (const bool one_length : {false, true}) {
        if ((has_states || !sequence_first) && (has_decoder || !one_length)) {
          result.push_back({std::nullopt, one_length, sequence_first, patches});
        }
      }
    }
  }
  return result;
}

}  // namespace

ExampleInputs make_example_inputs(const c10::FunctionSchema& forward, const Graph& traced, const Graph& flat,
                                  const Module& module, const at::TensorOptions& dtype) {
  ExampleInputs result;
  std::vector<Input> inputs;
  std::vector<std::string> masks;
  bool masks_can_be_left_out = true;
  for (size_t i = 1; i < forward.arguments().size(); ++i) {
    const Argument& argument = forward.arguments()[i];
    inputs.push_back(describe(argument, flat.inputs()[i], module));
    if (inputs.back().kind == Kind::kMask) {
      masks.push_back(argument.name());
      masks_can_be_left_out = masks_can_be_left_out && inputs.back().standard;
    }
    if (inputs.back().kind == Kind::kUnknown && result.reason.empty()) {
      result.reason = "what forward's argument '" + argument.name() + "' takes is not known";
    }
  }
  const Drawing drawing(dtype);
  for (const bool inverts_masks : {false, true}) {
    auto arguments = traced_arguments(inputs, traced, inverts_masks, drawing);
    if (arguments && (!inverts_masks || !masks.empty())) {
      result.candidates.push_back({std::move(*arguments), ""});
    }
  }
  if (!result.reason.empty()) {
    return result;
  }
  const at::ScalarType floats = drawing.dtype();
  const MaskForm forms[] = {{at::kLong},
                            {at::kBool},
                            {floats},
                            {at::kBool, MaskShape::kTokens, false, true},
                            {at::kBool, MaskShape::kKeys},
                            {floats, MaskShape::kKeys, true},
                            {at::kBool, MaskShape::kScores},
                            {floats, MaskShape::kScores, true},
                            {floats, MaskShape::kPairs, true}};
  std::vector<ExampleInputs::Candidate> without_masks;
  for (Attempt attempt : attempts_at(inputs, module)) {
    if (masks_can_be_left_out) {
      without_masks.push_back({draw(inputs, attempt, drawing), masks.empty() ? "" : untried(masks)});
    }
    for (const MaskForm& form : forms) {
      if (!masks.empty()) {
        attempt.masks = form;
        result.candidates.push_back({draw(inputs, attempt, drawing), ""});
      }
    }
  }
  std::move(without_masks.begin(), without_masks.end(), std::back_inserter(result.candidates));
  return result;
}

}  // namespace torchgraft
