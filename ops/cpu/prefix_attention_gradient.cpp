#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/cpu/prefix_attention.h>
#include <torchgraft/ops/cpu/prefix_attention_gradient.h>

#include <vector>

namespace torchgraft::ops::cpu {
namespace {

int64_t offset_of(const at::Tensor& tensor, int64_t row, int64_t head) {
  return row * tensor.stride(0) + head * tensor.stride(1);
}

// Where one head's rows begin in [B, h, S, d].
const float* rows_of(const at::Tensor& tensor, int64_t row, int64_t head) {
  return tensor.const_data_ptr<float>() + offset_of(tensor, row, head);
}

float* rows_to(const at::Tensor& tensor, int64_t row, int64_t head) {
  return tensor.defined() ? tensor.mutable_data_ptr<float>() + offset_of(tensor, row, head) : nullptr;
}

int64_t row_stride(const at::Tensor& tensor) { return tensor.defined() ? tensor.stride(2) : 0; }

// [B, h, S, d] over the memory of [B, S, h, d].
at::Tensor token_major(at::Tensor (*make)(at::IntArrayRef, at::TensorOptions), const at::Tensor& like) {
  return make({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options()).transpose(1, 2);
}

at::Tensor empty(at::IntArrayRef sizes, at::TensorOptions options) { return at::empty(sizes, options); }
at::Tensor zeros(at::IntArrayRef sizes, at::TensorOptions options) { return at::zeros(sizes, options); }

// [B, h_kv, P, d], gated.
at::Tensor gated(const at::Tensor& prefix, const at::Tensor& gate, int64_t batch) {
  const at::Tensor per_row = prefix.dim() == 4 ? prefix : prefix.unsqueeze(0);
  return apply_gate(per_row, gate).expand({batch, -1, -1, -1}).contiguous();
}

// What is the same for all heads: sizes, scale and strides.
HeadAttentionGradient job_of_all_heads(const PrefixArguments& args, const at::Tensor& query, const at::Tensor& key,
                                       const at::Tensor& value, const at::Tensor& output, const at::Tensor& sums,
                                       const at::Tensor& grad, const AttentionGradients& result) {
  HeadAttentionGradient job;
  job.queries = query.size(2);
  job.keys = key.size(2);
  job.head_size = query.size(3);
  job.scale = static_cast<float>(attention_scale(args).expect_float());
  job.is_causal = args.is_causal;
  job.q_stride = row_stride(query);
  job.k_stride = row_stride(key);
  job.v_stride = row_stride(value);
  job.output_stride = row_stride(output);
  job.log_sum_exp_stride = row_stride(sums);
  job.grad_stride = row_stride(grad);
  job.grad_q_stride = row_stride(result.query);
  job.grad_k_stride = row_stride(result.key);
  job.grad_v_stride = row_stride(result.value);
  return job;
}

}  // namespace

AttentionGradients attend_backward(const PrefixArguments& args, const Prefix& prefix, const at::Tensor& additive_mask,
                                   const AttentionForward& forward, const at::Tensor& incoming, bool need_key,
                                   bool need_value) {
  const at::Tensor query = with_dense_rows(args.query);
  const at::Tensor key = with_dense_rows(args.key);
  const at::Tensor value = with_dense_rows(args.value);
  const at::Tensor grad = with_dense_rows(incoming);
  const at::Tensor output = with_dense_rows(forward.output);
  const int64_t batch = query.size(0);
  const int64_t kv_heads = key.size(1);
  const int64_t group = query.size(1) / kv_heads;
  const at::Tensor prefix_key = gated(prefix.key, prefix.key_gate, batch);
  const at::Tensor prefix_value = gated(prefix.value, prefix.value_gate, batch);
  const std::vector<int64_t> used = prefix_lengths(prefix, batch);
  const at::Tensor mask = expanded_mask(args, additive_mask);
  AttentionGradients result{.query = token_major(empty, query),
                            .key = need_key ? token_major(zeros, key) : at::Tensor(),
                            .value = need_value ? token_major(zeros, value) : at::Tensor(),
                            .prefix_key = at::zeros_like(prefix_key),
                            .prefix_value = at::zeros_like(prefix_value)};
  const at::Tensor& sums = forward.log_sum_exp;
  const HeadAttentionGradient common = job_of_all_heads(args, query, key, value, output, sums, grad, result);

  const auto one_head = [&](int64_t b, int64_t head, std::vector<float>& workspace) {
    HeadAttentionGradient job = common;
    const int64_t kv_head = head / group;
    job.q = rows_of(query, b, head);
    job.k = rows_of(key, b, kv_head);
    job.v = rows_of(value, b, kv_head);
    job.output = rows_of(output, b, head);
    job.log_sum_exp = rows_of(sums, b, head);
    job.grad = rows_of(grad, b, head);
    job.grad_q = rows_to(result.query, b, head);
    job.grad_k = rows_to(result.key, b, kv_head);
    job.grad_v = rows_to(result.value, b, kv_head);
    job.prefix = used[b];
    job.prefix_key = rows_of(prefix_key, b, kv_head);
    job.prefix_value = rows_of(prefix_value, b, kv_head);
    job.grad_prefix_key = rows_to(result.prefix_key, b, kv_head);
    job.grad_prefix_value = rows_to(result.prefix_value, b, kv_head);
    set_mask(job, mask, b, head);
    workspace.resize(kernels().attention_gradient_workspace(job));
    job.workspace = workspace.data();
    kernels().attention_gradient(job);
  };
  at::parallel_for(0, batch * kv_heads, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    std::vector<float> workspace;
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t i = 0; i < group; ++i) {
        one_head(task / kv_heads, task % kv_heads * group + i, workspace);
      }
    }
  });
  return result;
}

}  // namespace torchgraft::ops::cpu
