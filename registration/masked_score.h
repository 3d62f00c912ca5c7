#pragma once

namespace torchgraft {

// A score, or a float mask's element, at or below this hides a key: e^-9000 is zero in every dtype. Models write -1e4,
// -1e9, finfo.min or -inf for "masked"; relative position biases and ALiBi stay above -2e3 for any length in use.
// attention_token_mask and the patcher must agree on it.
constexpr double kMaskedScore = -9000.0;

// What attention_token_mask says of a row, whose number stands for {}; so does the code that lower() writes for it.
constexpr const char* kGroupsOfTokens =
    "attention_token_mask: row {} of the attention mask has groups of tokens that do not see each other; which of them "
    "is padding is not known. Let tokens of padding see what real tokens see, or nothing, or pool gates over all "
    "tokens "
    "(gate_pooling='all')";

}  // namespace torchgraft
