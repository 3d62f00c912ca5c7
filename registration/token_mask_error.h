#pragma once

namespace torchgraft {

// What attention_token_mask says of a row, whose number stands for {}. The code that lower() writes for it says the
// same.
constexpr const char* kTextIsNotKnown =
    "attention_token_mask: which tokens of row {} are padding cannot be told from its attention mask; "
    "let padding see what real tokens see, or nothing, or name the token mask as an input, "
    "or pool gates over all tokens (gate_pooling='all')";

}  // namespace torchgraft
