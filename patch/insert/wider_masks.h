#pragma once

#include <string>

namespace torchgraft {

// Functions in TorchScript that make attention masks right for more tokens, `added` of them at the front of each row,
// which has `tokens` others: those of a row's prompt, `lengths` of them, are visible, and its other columns follow.
// Where `own` is not None, rows have prompts of different lengths, and filler behind their own tokens.
//
//     wider_mask(mask, tokens, added, lengths, own)                  of an attention
//     wider_optional(mask, tokens, added, lengths, own)              of an attention, where it may be None
//     wider_flags(mask, tokens, added, lengths, own, has_keys_only)  of what sets or adds to scores; has_keys_only: a
//     table
//                                                            [B, S] that is still to be reshaped
//     wider_keys(mask, tokens, added, lengths, own, has_keys_only)   of an attention's mask that is still to be
//     reshaped shown(mask, own)                                       an attention's mask that hides what is not a
//     row's own
const std::string& wider_mask_source();

}  // namespace torchgraft
