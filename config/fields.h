#pragma once

#include <torchgraft/config/head_config.h>
#include <torchgraft/config/method_configs.h>

namespace torchgraft {

// The one list of each config's fields, which reading and writing go through: visit(name, member) is called for every
// field, in the order of the struct.

template <typename Config, typename Visitor>
void visit_bn_fields(Config& c, Visitor&& visit) {
  visit("mh_adapter", c.mh_adapter);
  visit("output_adapter", c.output_adapter);
  visit("reduction_factor", c.reduction_factor);
  visit("non_linearity", c.non_linearity);
  visit("original_ln_before", c.original_ln_before);
  visit("original_ln_after", c.original_ln_after);
  visit("ln_before", c.ln_before);
  visit("ln_after", c.ln_after);
  visit("init_weights", c.init_weights);
  visit("init_weights_seed", c.init_weights_seed);
  visit("is_parallel", c.is_parallel);
  visit("scaling", c.scaling);
  visit("use_gating", c.use_gating);
  visit("residual_before_ln", c.residual_before_ln);
  visit("adapter_residual_before_ln", c.adapter_residual_before_ln);
  visit("inv_adapter", c.inv_adapter);
  visit("inv_adapter_reduction_factor", c.inv_adapter_reduction_factor);
  visit("cross_adapter", c.cross_adapter);
  visit("leave_out", c.leave_out);
  visit("dropout", c.dropout);
  visit("phm_layer", c.phm_layer);
  visit("phm_dim", c.phm_dim);
  visit("factorized_phm_W", c.factorized_phm_W);
  visit("shared_W_phm", c.shared_W_phm);
  visit("shared_phm_rule", c.shared_phm_rule);
  visit("factorized_phm_rule", c.factorized_phm_rule);
  visit("phm_c_init", c.phm_c_init);
  visit("phm_init_range", c.phm_init_range);
  visit("learn_phm", c.learn_phm);
  visit("hypercomplex_nonlinearity", c.hypercomplex_nonlinearity);
  visit("phm_rank", c.phm_rank);
  visit("phm_bias", c.phm_bias);
  visit("stochastic_depth", c.stochastic_depth);
}

template <typename Config, typename Visitor>
void visit_prefix_fields(Config& c, Visitor&& visit) {
  visit("encoder_prefix", c.encoder_prefix);
  visit("cross_prefix", c.cross_prefix);
  visit("leave_out", c.leave_out);
  visit("flat", c.flat);
  visit("prefix_length", c.prefix_length);
  visit("bottleneck_size", c.bottleneck_size);
  visit("non_linearity", c.non_linearity);
  visit("dropout", c.dropout);
  visit("use_gating", c.use_gating);
  visit("shared_gating", c.shared_gating);
  visit("init_weights_seed", c.init_weights_seed);
}

template <typename Config, typename Visitor>
void visit_prompt_fields(Config& c, Visitor&& visit) {
  visit("prompt_length", c.prompt_length);
  visit("prompt_init", c.prompt_init);
  visit("prompt_init_text", c.prompt_init_text);
  visit("combine", c.combine);
  visit("init_weights_seed", c.init_weights_seed);
  visit("random_uniform_scale", c.random_uniform_scale);
}

template <typename Config, typename Visitor>
void visit_lora_fields(Config& c, Visitor&& visit) {
  visit("selfattn_lora", c.selfattn_lora);
  visit("intermediate_lora", c.intermediate_lora);
  visit("output_lora", c.output_lora);
  visit("leave_out", c.leave_out);
  visit("r", c.r);
  visit("alpha", c.alpha);
  visit("dropout", c.dropout);
  visit("attn_matrices", c.attn_matrices);
  visit("composition_mode", c.composition_mode);
  visit("init_weights", c.init_weights);
  visit("init_weights_seed", c.init_weights_seed);
  visit("use_gating", c.use_gating);
  visit("use_dora", c.use_dora);
  visit("vera_d", c.vera_d);
  visit("vera_b", c.vera_b);
  visit("dtype", c.dtype);
  visit("attn_output_lora", c.attn_output_lora);
  visit("gate_lora", c.gate_lora);
  visit("linear_maps", c.linear_maps);
  visit("lora_bias", c.lora_bias);
}

// MTLLoRAConfig's: those of LoRAConfig, and its own.
template <typename Config, typename Visitor>
void visit_mtl_lora_fields(Config& c, Visitor&& visit) {
  visit_lora_fields(c, visit);
  visit("n_up_projection", c.n_up_projection);
  visit("task_specific_matrix_type", c.task_specific_matrix_type);
  visit("weights_sharpness", c.weights_sharpness);
}

template <typename Config, typename Visitor>
void visit_head_fields(Config& c, Visitor&& visit) {
  visit("head_type", c.head_type);
  visit("num_labels", c.num_labels);
  visit("layers", c.layers);
  visit("activation_function", c.activation_function);
  visit("label2id", c.label2id);
  visit("use_pooler", c.use_pooler);
  visit("bias", c.bias);
  visit("dropout_prob", c.dropout_prob);
}

}  // namespace torchgraft
