#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/cpu/prefix_attention.h>
#include <torchgraft/ops/kernel_choice.h>

#include <vector>

namespace torchgraft::ops::cpu {
namespace {

at::Tensor with_dense_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) == 1 ? tensor : tensor.contiguous();
}

// A value per batch row; 1 without gates.
std::vector<float> per_row(const at::Tensor& gate, int64_t batch) {
  std::vector<float> result(batch, 1.0F);
  if (gate.defined()) {
    const at::Tensor values = gate.contiguous();
    std::copy_n(values.const_data_ptr<float>(), batch, result.begin());
  }
  return result;
}

// How many prefix positions each batch row uses.
std::vector<int64_t> lengths(const Prefix& prefix, int64_t batch) {
  const int64_t positions = prefix.key.size(-2);
  std::vector<int64_t> result(batch, positions);
  if (prefix.hidden.defined()) {
    const at::Tensor used = prefix.hidden.logical_not().sum(-1).flatten().contiguous();
    for (int64_t b = 0; b < batch; ++b) {
      result[b] = used.const_data_ptr<int64_t>()[used.numel() == 1 ? 0 : b];
    }
  }
  return result;
}

}  // namespace

bool takes(const PrefixArguments& args) {
  return args.dropout_p == 0.0 && takes_fused_kernels(args.query) && !at::isTensorSubclassLike(args.key);
}

AttentionForward attend(const PrefixArguments& args, const Prefix& prefix, const at::Tensor& additive_mask) {
  const at::Tensor query = with_dense_rows(args.query);
  const at::Tensor key = with_dense_rows(args.key);
  const at::Tensor value = with_dense_rows(args.value);
  const int64_t batch = query.size(0);
  const int64_t heads = query.size(1);
  const int64_t queries = query.size(2);
  const int64_t head_size = query.size(3);
  const int64_t group = heads / key.size(1);
  const int64_t positions = prefix.key.size(-2);
  const at::Tensor prefix_key = prefix.key.contiguous();  // [(B,) h_kv, P, d]
  const at::Tensor prefix_value = prefix.value.contiguous();
  const int64_t prefix_row = prefix_key.dim() == 4 ? prefix_key.stride(0) : 0;
  const std::vector<float> key_gates = per_row(prefix.key_gate, batch);
  const std::vector<float> value_gates = per_row(prefix.value_gate, batch);
  const std::vector<int64_t> used = lengths(prefix, batch);
  const at::Tensor mask =
      additive_mask.defined() ? additive_mask.expand({batch, heads, queries, key.size(2)}) : at::Tensor();
  const auto scale = static_cast<float>(attention_scale(args).expect_float());

  at::Tensor output = at::empty({batch, queries, heads, head_size}, query.options());  // token-major
  at::Tensor log_sum_exp = at::empty({batch, queries, heads}, query.options());
  const auto work = [&](int64_t begin, int64_t end) {
    std::vector<float> workspace;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / heads;
      const int64_t head = task % heads;
      const int64_t kv_head = head / group;
      HeadAttention job;
      job.queries = queries;
      job.keys = key.size(2);
      job.head_size = head_size;
      job.prefix = used[b];
      job.q = query.const_data_ptr<float>() + b * query.stride(0) + head * query.stride(1);
      job.q_stride = query.stride(2);
      job.k = key.const_data_ptr<float>() + b * key.stride(0) + kv_head * key.stride(1);
      job.k_stride = key.stride(2);
      job.v = value.const_data_ptr<float>() + b * value.stride(0) + kv_head * value.stride(1);
      job.v_stride = value.stride(2);
      const int64_t in_prefix = b * prefix_row + kv_head * positions * head_size;
      job.prefix_key = prefix_key.const_data_ptr<float>() + in_prefix;
      job.prefix_value = prefix_value.const_data_ptr<float>() + in_prefix;
      job.key_gate = key_gates[b];
      job.value_gate = value_gates[b];
      job.scale = scale;
      if (mask.defined()) {
        job.mask = mask.const_data_ptr<float>() + b * mask.stride(0) + head * mask.stride(1);
        job.mask_row_stride = mask.stride(2);
        job.mask_column_stride = mask.stride(3);
      }
      job.is_causal = args.is_causal;
      job.output = output.mutable_data_ptr<float>() + (b * queries * heads + head) * head_size;
      job.output_stride = heads * head_size;
      job.log_sum_exp = log_sum_exp.mutable_data_ptr<float>() + b * queries * heads + head;
      job.log_sum_exp_stride = heads;
      workspace.resize(std::max<size_t>(workspace.size(), kernels().attention_workspace(job)));
      job.workspace = workspace.data();
      kernels().attention(job);
    }
  };
  at::parallel_for(0, batch * heads, /*grain_size=*/1, work);
  return {output.transpose(1, 2), log_sum_exp.transpose(1, 2)};
}

}  // namespace torchgraft::ops::cpu
