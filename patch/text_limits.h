#pragma once

#include <torchgraft/registration/export.h>

#include <c10/util/ArrayRef.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// Which texts an encoder takes, as far as its graph shows it. nullopt: it does not show it.
struct TextLimits {
  std::optional<int64_t> vocabulary;  // token ids are below it: the rows of the smallest table that they index
  std::optional<int64_t> positions;   // the most tokens of a text: as many as its table of positions has entries for
};

// Reads the limits of `module`, grafted or not, from its graph. Positions: the part of the graph that computes the
// indices of a table from the text's length runs, for the largest length whose indices are in the table; so positions
// that begin behind the padding's (RoBERTa) count as the model counts them. Throws as ForwardInputs does when the
// module takes no token ids.
TORCHGRAFT_PATCH_API TextLimits text_limits(const torch::jit::Module& module);

// How many rows the tables have that argument `argument` of forward indexes (self is number 0): those of the smallest;
// nullopt where the graph does not show it. For modules that take more than a text, such as decoders.
TORCHGRAFT_PATCH_API std::optional<int64_t> rows_indexed_by(const torch::jit::Module& module, size_t argument);

// Why a model does not take a text.
struct TextFault {
  bool is_too_long;     // else it has a token that the model does not have
  std::string message;  // "expected at most 64 tokens in a row, which the model has positions for, got 65"
};

// What is wrong with the token ids of one text; nullopt: nothing. Ids are checked where the vocabulary is known.
TORCHGRAFT_PATCH_API std::optional<TextFault> text_fault(const TextLimits& limits, at::IntArrayRef ids);

// Throws c10::Error, on behalf of `what`, when `arguments` of forward (without self) hold a text that the model does
// not take, naming the row. Says nothing of a module that takes no token ids.
TORCHGRAFT_PATCH_API void check_texts(const torch::jit::Module& module, const std::vector<c10::IValue>& arguments,
                                      const char* what);

}  // namespace torchgraft
