#pragma once

#include <torchgraft/registration/export.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/jit/api/module.h>

#include <cstddef>
#include <string>
#include <vector>

namespace torchgraft {

// A batch of tokenised texts.
struct TokenTensors {
  at::Tensor ids;         // [B, S] int64
  at::Tensor mask = {};   // [B, S] int64, 1 where a token is real; undefined if no argument takes it
  at::Tensor types = {};  // [B, S] int64; undefined: all are 0
};

// Which arguments of a text encoder take the token ids, the mask and the token types.
//
// Names decide: a Tensor or Optional[Tensor] with "mask" in its name takes the mask, another with "type" in its name
// the token types, the first of the others the ids. Every other argument keeps its default; so does `adapter_ids` of a
// grafted module, which is given by name.
class TORCHGRAFT_PATCH_API ForwardInputs {
 public:
  // Throws c10::Error that names the argument when a text gives nothing for it and it has no default, and when no
  // argument takes the ids.
  explicit ForwardInputs(const c10::FunctionSchema& schema);
  explicit ForwardInputs(const torch::jit::Module& module, const std::string& method = "forward");

  // The positional arguments (without self) up to the last that the text gives; those between have their defaults.
  std::vector<c10::IValue> arguments(const TokenTensors& tokens) const;

  // Where the ids go among the arguments, self being number 0.
  size_t ids_position() const { return ids_position_; }

  // A model that takes no mask reads padding as tokens: give it rows of one length.
  bool takes_mask() const { return takes_mask_; }

 private:
  enum class Kind { kIds, kMask, kTypes, kDefault };
  struct Input {
    Kind kind = Kind::kDefault;
    c10::IValue default_value;  // of kDefault
  };

  Kind kind_of(const c10::Argument& argument) const;

  std::vector<Input> inputs_;
  size_t ids_position_ = 0;  // 0: none yet
  bool takes_mask_ = false;
};

}  // namespace torchgraft
