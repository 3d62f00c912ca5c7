#include <ATen/core/dispatch/Dispatcher.h>
#include <torchgraft/ops/attention_token_mask.h>

namespace torchgraft::ops {

at::Tensor attention_token_mask(const at::Tensor& x, const std::optional<at::Tensor>& attn_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchgraft::attention_token_mask", "")
                             .typed<decltype(attention_token_mask)>();
  return op.call(x, attn_mask);
}

}  // namespace torchgraft::ops
