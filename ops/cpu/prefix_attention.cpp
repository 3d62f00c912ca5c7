#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/cpu/prefix_attention.h>
#include <torchgraft/ops/cpu/token_tiles.h>
#include <torchgraft/ops/kernel_choice.h>

#include <vector>

namespace torchgraft::ops::cpu {

at::Tensor with_dense_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) == 1 ? tensor : tensor.contiguous();
}

namespace {

// Rows of head_size of one head of [B, h, S, d], as float32: where they lie, or widened.
class HeadRows {
 public:
  // Sets `data` to the first row, and `stride` to the distance of rows.
  void read(const at::Tensor& tensor, int64_t b, int64_t head, const float*& data, int64_t& stride) {
    const Numbers first = numbers_of(tensor) + (b * tensor.stride(0) + head * tensor.stride(1));
    data = first.float32();
    stride = tensor.stride(2);
    if (first.is_bfloat16) {
      const int64_t size = tensor.size(3);
      widened_.resize(tensor.size(2) * size);
      for (int64_t row = 0; row < tensor.size(2); ++row) {
        kernels().widen((first + row * stride).bfloat16(), size, widened_.data() + row * size);
      }
      data = widened_.data();
      stride = size;
    }
  }

 private:
  std::vector<float> widened_;
};

// Keys and values of prefixes [(B or N,) h_kv, P, d], as float32.
class PrefixRows {
 public:
  explicit PrefixRows(const Prefix& prefix)
      : key_(prefix.key.to(at::kFloat).contiguous()),
        value_(prefix.value.to(at::kFloat).contiguous()),
        slices_(prefix.rows.defined() ? prefix.rows.contiguous() : at::Tensor()) {}

  void read(int64_t b, int64_t kv_head, HeadAttention& job) const {
    const int64_t slice = slices_.defined() ? slices_.const_data_ptr<int64_t>()[b] : b;
    const int64_t first = (key_.dim() == 4 ? slice * key_.stride(0) : 0) + kv_head * key_.stride(-3);
    job.prefix_key = key_.const_data_ptr<float>() + first;
    job.prefix_value = value_.const_data_ptr<float>() + first;
  }

 private:
  at::Tensor key_;
  at::Tensor value_;
  at::Tensor slices_;  // int64 [B]
};

// A value per batch row; 1 without gates.
std::vector<float> per_row(const at::Tensor& gate, int64_t batch) {
  std::vector<float> result(batch, 1.0F);
  if (gate.defined()) {
    const at::Tensor values = gate.contiguous();
    std::copy_n(values.const_data_ptr<float>(), batch, result.begin());
  }
  return result;
}

}  // namespace

std::vector<int64_t> prefix_lengths(const Prefix& prefix, int64_t batch) {
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

at::Tensor expanded_mask(const PrefixArguments& args, const at::Tensor& mask) {
  const at::Tensor& query = args.query;
  return mask.defined() ? mask.to(at::kFloat).expand({query.size(0), query.size(1), query.size(2), args.key.size(2)})
                        : mask;
}

bool takes_fused_attention(const PrefixArguments& args) {
  return args.dropout_p == 0.0 && takes_fused_kernels(FusedOp::kPrefixAttention, args.query) &&
         !at::isTensorSubclassLike(args.key);
}

bool reads_bank_in_place(const PrefixArguments& args, const Selection& selection) {
  const auto is_dense = [](const at::Tensor& bank) {
    return bank.scalar_type() == at::kFloat && !at::isTensorSubclassLike(bank) && bank.is_contiguous();
  };
  return takes_fused_attention(args) && is_dense(args.prefix_key) && is_dense(args.prefix_value) &&
         !at::isTensorSubclassLike(selection.rows);
}

AttentionForward attend(const PrefixArguments& args, const Prefix& prefix, const at::Tensor& additive_mask) {
  const at::Tensor query = with_dense_rows(args.query);
  const at::Tensor key = with_dense_rows(args.key);
  const at::Tensor value = with_dense_rows(args.value);
  const int64_t batch = query.size(0);
  const int64_t heads = query.size(1);
  const int64_t queries = query.size(2);
  const int64_t head_size = query.size(3);
  const PrefixRows prefix_rows(prefix);
  const std::vector<float> key_gates = per_row(prefix.key_gate, batch);
  const std::vector<float> value_gates = per_row(prefix.value_gate, batch);
  const std::vector<int64_t> used = prefix_lengths(prefix, batch);
  const at::Tensor mask = expanded_mask(args, additive_mask);
  const auto scale = static_cast<float>(attention_scale(args).expect_float());

  at::Tensor output = at::empty({batch, queries, heads, head_size}, query.options());  // token-major
  at::Tensor log_sum_exp = at::empty({batch, queries, heads}, query.options().dtype(at::kFloat));
  auto* to = static_cast<char*>(output.mutable_data_ptr());
  const auto work = [&](int64_t begin, int64_t end) {
    std::vector<float> workspace;
    HeadRows query_rows, key_rows, value_rows;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / heads;
      const int64_t head = task % heads;
      const int64_t kv_head = head / (heads / key.size(1));
      HeadAttention job;
      job.queries = queries;
      job.keys = key.size(2);
      job.head_size = head_size;
      job.prefix = used[b];
      query_rows.read(query, b, head, job.q, job.q_stride);
      key_rows.read(key, b, kv_head, job.k, job.k_stride);
      value_rows.read(value, b, kv_head, job.v, job.v_stride);
      prefix_rows.read(b, kv_head, job);
      job.key_gate = key_gates[b];
      job.value_gate = value_gates[b];
      job.scale = scale;
      set_mask(job, mask, b, head);
      job.is_causal = args.is_causal;
      const FloatResult result(query.scalar_type() == at::kBFloat16,
                               to + (b * queries * heads + head) * head_size * output.element_size(), queries,
                               head_size, heads * head_size);
      job.output = result.data();
      job.output_stride = result.stride();
      job.log_sum_exp = log_sum_exp.mutable_data_ptr<float>() + b * queries * heads + head;
      job.log_sum_exp_stride = heads;
      workspace.resize(std::max<size_t>(workspace.size(), kernels().attention_workspace(job)));
      job.workspace = workspace.data();
      kernels().attention(job);
      result.store();
    }
  };
  at::parallel_for(0, batch * heads, /*grain_size=*/1, work);
  return {output.transpose(1, 2), log_sum_exp.transpose(1, 2)};
}

}  // namespace torchgraft::ops::cpu
