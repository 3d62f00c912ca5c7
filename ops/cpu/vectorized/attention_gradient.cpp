#include <torchgraft/ops/cpu/vectorized/lanes.h>

#include <algorithm>
#include <limits>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {
namespace {

// Everything of size [queries, keys] exists for one block of queries and keys at a time, and stays in the second cache.
// Queries lie along the vectors: their log-sum-exps are then one vector, and keys and values are read where they are.
constexpr int64_t kQueryBlock = 64;  // a multiple of the lanes
constexpr int64_t kKeyBlock = 96;    // a multiple of outer_product's rows
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The parts of a job's workspace. In a block of fewer queries the last columns hold leftovers.
struct Workspace {
  float* queries;             // [kQueryBlock, head_size], scaled
  float* queries_transposed;  // [head_size, kQueryBlock]
  float* grads_transposed;    // [head_size, kQueryBlock]
  float* log_sum_exps;        // [kQueryBlock], negative
  float* deltas;              // [kQueryBlock], negative: <grad, output>
  float* probabilities;       // [kKeyBlock, kQueryBlock]
  float* scores;              // [kKeyBlock, kQueryBlock]: gradients of the scores
  float* by_query;            // [kQueryBlock, kKeyBlock]: the same, transposed

  explicit Workspace(const HeadAttentionGradient& job)
      : queries(job.workspace),
        queries_transposed(queries + kQueryBlock * job.head_size),
        grads_transposed(queries_transposed + kQueryBlock * job.head_size),
        log_sum_exps(grads_transposed + kQueryBlock * job.head_size),
        deltas(log_sum_exps + kQueryBlock),
        probabilities(deltas + kQueryBlock),
        scores(probabilities + kKeyBlock * kQueryBlock),
        by_query(scores + kKeyBlock * kQueryBlock) {}
  const float* end() const { return by_query + kQueryBlock * kKeyBlock; }
};

// Neighbouring queries.
struct QueryBlock {
  int64_t first, count;
  int64_t padded() const { return in_vectors(count); }
};

// Neighbouring keys with their values, and where their gradients are summed; null: not asked for.
struct KeyBlock {
  int64_t first, count;  // positions in the sequence; of a prefix, positions in it
  bool is_prefix;
  const float* k;
  int64_t k_stride;
  const float* v;
  int64_t v_stride;
  float* grad_k;
  int64_t grad_k_stride;
  float* grad_v;
  int64_t grad_v_stride;
};

KeyBlock prefix_block(const HeadAttentionGradient& job, int64_t first) {
  const int64_t offset = first * job.head_size;
  const auto at = [offset](float* pointer) { return pointer == nullptr ? nullptr : pointer + offset; };
  return {.first = first,
          .count = std::min(kKeyBlock, job.prefix - first),
          .is_prefix = true,
          .k = job.prefix_key + offset,
          .k_stride = job.head_size,
          .v = job.prefix_value + offset,
          .v_stride = job.head_size,
          .grad_k = at(job.grad_prefix_key),
          .grad_k_stride = job.head_size,
          .grad_v = at(job.grad_prefix_value),
          .grad_v_stride = job.head_size};
}

KeyBlock sequence_block(const HeadAttentionGradient& job, int64_t first) {
  const auto at = [first](float* pointer, int64_t stride) {
    return pointer == nullptr ? nullptr : pointer + first * stride;
  };
  return {.first = first,
          .count = std::min(kKeyBlock, job.keys - first),
          .is_prefix = false,
          .k = job.k + first * job.k_stride,
          .k_stride = job.k_stride,
          .v = job.v + first * job.v_stride,
          .v_stride = job.v_stride,
          .grad_k = at(job.grad_k, job.grad_k_stride),
          .grad_k_stride = job.grad_k_stride,
          .grad_v = at(job.grad_v, job.grad_v_stride),
          .grad_v_stride = job.grad_v_stride};
}

void pack_queries(const HeadAttentionGradient& job, const Workspace& space, const QueryBlock& block) {
  const int64_t size = job.head_size;
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t query = block.first + i;
    std::copy_n(job.q + query * job.q_stride, size, space.queries + i * size);
    const float* grad = job.grad + query * job.grad_stride;
    const float* output = job.output + query * job.output_stride;
    float delta = 0.0F;
#pragma omp simd reduction(+ : delta)
    for (int64_t j = 0; j < size; ++j) {
      delta += grad[j] * output[j];
    }
    space.deltas[i] = -delta;
    space.log_sum_exps[i] = -job.log_sum_exp[query * job.log_sum_exp_stride];
  }
  scale_row(space.queries, block.count * size, job.scale);
  transpose(space.queries, size, block.count, size, nullptr, space.queries_transposed, kQueryBlock);
  transpose(job.grad + block.first * job.grad_stride, job.grad_stride, block.count, size, nullptr,
            space.grads_transposed, kQueryBlock);
}

// Writes the summands of one key's products with the queries: mask - log_sum_exp.
void start_key(const HeadAttentionGradient& job, const Workspace& space, const QueryBlock& queries, int64_t key,
               float* row) {
  const float* mask = job.mask + queries.first * job.mask_row_stride + key * job.mask_column_stride;
  for (int64_t i = 0; i < queries.count; ++i) {
    row[i] = mask[i * job.mask_row_stride] + space.log_sum_exps[i];
  }
}

// probabilities = exp(k q^T + mask - log_sum_exp)
void recompute_probabilities(const HeadAttentionGradient& job, const Workspace& space, const QueryBlock& queries,
                             const KeyBlock& keys) {
  OuterProduct product{.rows = keys.count,
                       .columns = queries.padded(),
                       .depth = job.head_size,
                       .x = keys.k,
                       .x_stride = keys.k_stride,
                       .w = space.queries_transposed,
                       .w_stride = kQueryBlock,
                       .init = space.log_sum_exps,
                       .init_stride = 0,
                       .y = space.probabilities,
                       .y_stride = kQueryBlock};
  const bool masked = job.mask != nullptr && !keys.is_prefix;
  if (masked) {
    for (int64_t j = 0; j < keys.count; ++j) {
      start_key(job, space, queries, keys.first + j, space.probabilities + j * kQueryBlock);
    }
    product.init = space.probabilities;
    product.init_stride = kQueryBlock;
  }
  outer_product(product);
  for (int64_t j = 0; j < keys.count; ++j) {
    float* row = space.probabilities + j * kQueryBlock;
    if (job.is_causal && !keys.is_prefix) {
      const int64_t blind = std::clamp<int64_t>(keys.first + j - queries.first, 0, queries.count);
      std::fill_n(row, blind, -kInfinity);
    }
    for (int64_t i = 0; i < queries.padded(); i += kLanes) {
      Vec::loadu(row + i).exp_u20().store(row + i);
    }
  }
}

// scores = probabilities (v grad^T - delta)
void score_gradients(const HeadAttentionGradient& job, const Workspace& space, const QueryBlock& queries,
                     const KeyBlock& keys) {
  outer_product({.rows = keys.count,
                 .columns = queries.padded(),
                 .depth = job.head_size,
                 .x = keys.v,
                 .x_stride = keys.v_stride,
                 .w = space.grads_transposed,
                 .w_stride = kQueryBlock,
                 .init = space.deltas,
                 .init_stride = 0,
                 .y = space.scores,
                 .y_stride = kQueryBlock});
  for (int64_t j = 0; j < keys.count; ++j) {
    float* row = space.scores + j * kQueryBlock;
    const float* probability = space.probabilities + j * kQueryBlock;
    for (int64_t i = 0; i < queries.padded(); i += kLanes) {
      (Vec::loadu(row + i) * Vec::loadu(probability + i)).store(row + i);
    }
  }
}

void through_block(const HeadAttentionGradient& job, const Workspace& space, const QueryBlock& queries,
                   const KeyBlock& keys) {
  recompute_probabilities(job, space, queries, keys);
  const int64_t size = job.head_size;
  if (keys.grad_v != nullptr) {
    outer_product({.rows = keys.count,
                   .columns = size,
                   .depth = queries.count,
                   .x = space.probabilities,
                   .x_stride = kQueryBlock,
                   .w = job.grad + queries.first * job.grad_stride,
                   .w_stride = job.grad_stride,
                   .init = keys.grad_v,
                   .init_stride = keys.grad_v_stride,
                   .y = keys.grad_v,
                   .y_stride = keys.grad_v_stride});
  }
  score_gradients(job, space, queries, keys);
  if (keys.grad_k != nullptr) {
    outer_product({.rows = keys.count,
                   .columns = size,
                   .depth = queries.count,
                   .x = space.scores,
                   .x_stride = kQueryBlock,
                   .w = space.queries,
                   .w_stride = size,
                   .init = keys.grad_k,
                   .init_stride = keys.grad_k_stride,
                   .y = keys.grad_k,
                   .y_stride = keys.grad_k_stride});
  }
  transpose(space.scores, kQueryBlock, keys.count, queries.count, nullptr, space.by_query, kKeyBlock);
  float* grad_q = job.grad_q + queries.first * job.grad_q_stride;
  outer_product({.rows = queries.count,
                 .columns = size,
                 .depth = keys.count,
                 .x = space.by_query,
                 .x_stride = kKeyBlock,
                 .w = keys.k,
                 .w_stride = keys.k_stride,
                 .init = grad_q,
                 .init_stride = job.grad_q_stride,
                 .y = grad_q,
                 .y_stride = job.grad_q_stride});
}

}  // namespace

int64_t attention_gradient_workspace(const HeadAttentionGradient& job) {
  HeadAttentionGradient empty = job;
  float origin = 0.0F;
  empty.workspace = &origin;
  return Workspace(empty).end() - &origin;
}

void attention_gradient(const HeadAttentionGradient& job) {
  const Workspace space(job);
  for (int64_t first = 0; first < job.queries; first += kQueryBlock) {
    const QueryBlock queries{first, std::min(kQueryBlock, job.queries - first)};
    pack_queries(job, space, queries);
    for (int64_t i = 0; i < queries.count; ++i) {
      std::fill_n(job.grad_q + (first + i) * job.grad_q_stride, job.head_size, 0.0F);
    }
    for (int64_t position = 0; position < job.prefix; position += kKeyBlock) {
      through_block(job, space, queries, prefix_block(job, position));
    }
    const int64_t seen = job.is_causal ? std::min(job.keys, first + queries.count) : job.keys;
    for (int64_t key = 0; key < seen; key += kKeyBlock) {
      through_block(job, space, queries, sequence_block(job, key));
    }
    for (int64_t i = 0; i < queries.count; ++i) {
      scale_row(job.grad_q + (first + i) * job.grad_q_stride, job.head_size, job.scale);
    }
  }
}

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
