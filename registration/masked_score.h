#pragma once

namespace torchgraft {

// A score, or a float mask's element, at or below this hides a key: e^-9000 is zero in every dtype. Models write -1e4,
// -1e9, finfo.min or -inf for "masked"; relative position biases and ALiBi stay above -2e3 for any length in use.
// attention_token_mask and the patcher must agree on it.
constexpr double kMaskedScore = -9000.0;

}  // namespace torchgraft
