#include <torch/library.h>

// Everything that libtorchgraft adds to the dispatcher. Schemas are frozen once released: new arguments come last and
// have defaults. ops/<name>.h says what each operator means; ops/forward/<name>.cpp computes it.
TORCH_LIBRARY(torchgraft, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  m.def(
      "gated_bottleneck(Tensor x, Tensor residual, Tensor down_weight, Tensor down_bias, Tensor up_weight, "
      "Tensor up_bias, Tensor scaling, str non_linearity, Tensor? gate_weight=None, Tensor? gate_bias=None, "
      "Tensor? adapter_ids=None, int adapter=0, Tensor? token_mask=None) -> (Tensor output, Tensor gate)",
      tags);

  m.def(
      "gated_bottleneck_linear(Tensor x, Tensor input, Tensor weight, Tensor? bias, Tensor down_weight, "
      "Tensor down_bias, Tensor up_weight, Tensor up_bias, Tensor scaling, str non_linearity, "
      "Tensor? gate_weight=None, Tensor? gate_bias=None, Tensor? adapter_ids=None, int adapter=0, "
      "Tensor? token_mask=None) -> (Tensor output, Tensor gate)",
      tags);

  m.def(
      "gated_lora(Tensor x, Tensor base, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor? gate_weight=None, "
      "Tensor? gate_bias=None, Tensor? adapter_ids=None, int adapter=0, Tensor? token_mask=None) "
      "-> (Tensor output, Tensor gate)",
      tags);

  m.def(
      "gated_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scaling, "
      "Tensor? gate_weight=None, Tensor? gate_bias=None, Tensor? adapter_ids=None, int adapter=0, "
      "Tensor? token_mask=None) -> (Tensor output, Tensor gate)",
      tags);

  m.def(
      "gated_prefix_attention(Tensor query, Tensor key, Tensor value, Tensor x, Tensor prefix_key, "
      "Tensor prefix_value, Tensor prefix_length, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, "
      "*, float? scale=None, bool enable_gqa=False, Tensor? gate_weight=None, Tensor? gate_bias=None, "
      "Tensor? adapter_ids=None, int adapter=0, Tensor? token_mask=None) -> (Tensor output, Tensor gate)",
      tags);

  m.def(
      "reft(Tensor x, Tensor source_weight, Tensor source_bias, Tensor projection, Tensor subtraction, "
      "Tensor positions, str non_linearity=\"linear\", Tensor? adapter_ids=None, int adapter=0, "
      "Tensor? token_mask=None) -> Tensor",
      tags);

  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None, str non_linearity=\"linear\") -> Tensor", tags);

  m.def(
      "residual_norm(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
      "float eps=1e-05) -> (Tensor output, Tensor sum)",
      tags);

  m.def("attention_token_mask(Tensor x, Tensor? attn_mask=None) -> Tensor", tags);
}
