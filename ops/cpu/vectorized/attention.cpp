#include <torchgraft/ops/cpu/vectorized/lanes.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {
namespace {

constexpr int64_t kKeyBlock = 512;       // keys and prefix positions whose packed form stays in the second cache
constexpr int64_t kLongKeyBlock = 2048;  // the same of few queries, whose scores stay in the first cache
constexpr int64_t kQueryBlock = 12;      // a multiple of outer_product's rows
constexpr int64_t kFewQueries = 4;       // which read each key too seldom for packing it to pay
constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool has_few_queries(const HeadAttention& job) { return job.queries <= kFewQueries; }

int64_t key_block_size(const HeadAttention& job) { return has_few_queries(job) ? kLongKeyBlock : kKeyBlock; }

// The parts of a job's workspace.
struct Workspace {
  int64_t stride;  // of keys and scores: a block and a vector; rows a power of two apart would share few cache sets
  float* keys;     // [head_size, stride]: a block of keys, transposed and scaled; empty of few queries
  float* queries;  // [2, queries, head_size] of few queries: scaled for the sequence's keys, then for the prefix's
  float* scores;   // [kQueryBlock or fewer, stride]
  float* gates;    // [prefix]: the factor of a prefix's key, key_gate times scale
  float* scales;   // [stride]: of any other key, scale
  float* maxima;   // [queries]
  float* sums;     // [queries]

  explicit Workspace(const HeadAttention& job)
      : stride(in_vectors(std::min(key_block_size(job), job.prefix + job.keys)) + kLanes),
        keys(job.workspace),
        queries(keys + (has_few_queries(job) ? 0 : job.head_size * stride)),
        scores(queries + (has_few_queries(job) ? 2 * job.queries * job.head_size : 0)),
        gates(scores + std::min(kQueryBlock, job.queries) * stride),
        scales(gates + job.prefix),
        maxima(scales + stride),
        sums(maxima + job.queries) {}
  float* end(const HeadAttention& job) const { return sums + job.queries; }
};

// Neighbouring positions of prefix and sequence: of the prefix [prefix_begin, prefix_end), of the keys
// [key_begin, key_end).
struct KeyBlock {
  int64_t prefix_begin, prefix_end, key_begin, key_end;
  int64_t prefix() const { return prefix_end - prefix_begin; }
  int64_t keys() const { return key_end - key_begin; }
  int64_t size() const { return prefix() + keys(); }
  // In whole vectors: what is beyond size() has key 0 and score -inf.
  int64_t padded() const { return in_vectors(size()); }
};

KeyBlock key_block(const HeadAttention& job, int64_t begin) {
  const int64_t end = std::min(begin + key_block_size(job), job.prefix + job.keys);
  const auto in_keys = [&](int64_t position) { return std::max<int64_t>(position - job.prefix, 0); };
  return {.prefix_begin = std::min(begin, job.prefix),
          .prefix_end = std::min(end, job.prefix),
          .key_begin = in_keys(begin),
          .key_end = in_keys(end)};
}

// Asks for the first rows early: they lie too far apart for the processor to guess.
void prefetch_rows(const float* rows, int64_t stride, int64_t count, int64_t size) {
  constexpr int64_t kMost = 64;
  for (int64_t i = 0; i < std::min(count, kMost); ++i) {
    for (int64_t j = 0; j < size; j += kLine) {
      __builtin_prefetch(rows + i * stride + j);
    }
  }
}

void pack_keys(const HeadAttention& job, const Workspace& space, const KeyBlock& block) {
  transpose(job.prefix_key + block.prefix_begin * job.head_size, job.head_size, block.prefix(), job.head_size,
            space.gates, space.keys, space.stride);
  transpose(job.k + block.key_begin * job.k_stride, job.k_stride, block.keys(), job.head_size, space.scales,
            space.keys + block.prefix(), space.stride);
  for (int64_t i = 0; i < job.head_size && block.padded() > block.size(); ++i) {
    std::fill_n(space.keys + i * space.stride + block.size(), block.padded() - block.size(), 0.0F);
  }
}

// Writes the summands of one query's scores: 0 on the prefix, the mask on the keys.
void start_row(const HeadAttention& job, const KeyBlock& block, int64_t query, float* row) {
  std::fill_n(row + block.size(), block.padded() - block.size(), -kInfinity);
  std::fill_n(row, block.prefix(), 0.0F);
  row += block.prefix();
  if (job.mask == nullptr) {
    std::fill_n(row, block.keys(), 0.0F);
    return;
  }
  const float* mask = job.mask + query * job.mask_row_stride + block.key_begin * job.mask_column_stride;
  if (job.mask_column_stride == 1) {
    std::copy_n(mask, block.keys(), row);
    return;
  }
  for (int64_t key = 0; key < block.keys(); ++key) {
    row[key] = mask[key * job.mask_column_stride];
  }
}

// Of `count` values, a multiple of the lanes.
float largest_of(const float* row, int64_t count) {
  Vec lanes = Vec::loadu(row);
  for (int64_t i = kLanes; i < count; i += kLanes) {
    lanes = at::vec::maximum(lanes, Vec::loadu(row + i));
  }
  return at::vec::vec_reduce_all([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, lanes);
}

// row, a multiple of the lanes, becomes exp(row - largest); returns the sum.
float exponentials(float* row, int64_t count, float largest) {
  const Vec offset(largest);
  Vec lanes(0.0F);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec value = (Vec::loadu(row + i) - offset).exp_u20();
    value.store(row + i);
    lanes = lanes + value;
  }
  return lane_sum(lanes);
}

// Adds one block of keys to the running softmax of one query: its scores become weights, and earlier sums are scaled to
// the new maximum.
void weigh_row(const HeadAttention& job, const Workspace& space, const KeyBlock& block, int64_t query, float* row) {
  if (job.is_causal && query + 1 < block.key_end) {
    const int64_t seen = std::clamp<int64_t>(query + 1 - block.key_begin, 0, block.keys());
    std::fill_n(row + block.prefix() + seen, block.keys() - seen, -kInfinity);
  }
  const float before = space.maxima[query];
  const float here = largest_of(row, block.padded());
  const float largest = before > here ? before : here;  // NaN if a score is NaN
  if (largest == -kInfinity) {                          // nothing to see yet
    std::fill_n(row, block.size(), 0.0F);
    return;
  }
  const float factor = std::exp(before - largest);
  space.sums[query] = space.sums[query] * factor + exponentials(row, block.padded(), largest);
  space.maxima[query] = largest;
  if (factor != 1.0F) {
    scale_row(job.output + query * job.output_stride, job.head_size, factor);
  }
}

// Writes all queries, which are few, times `scale`.
void scale_few(const HeadAttention& job, float scale, float* to) {
  for (int64_t query = 0; query < job.queries; ++query) {
    std::copy_n(job.q + query * job.q_stride, job.head_size, to + query * job.head_size);
  }
  scale_row(to, job.queries * job.head_size, scale);
}

// Adds products of all queries, which are few and scaled, with rows of keys to scores from `column` on.
void score_few(const HeadAttention& job, const Workspace& space, const float* queries, const float* keys,
               int64_t key_stride, int64_t count, int64_t column) {
  DotProduct product;
  product.rows = job.queries;
  product.columns = count;
  product.depth = product.x_stride = job.head_size;
  product.x = queries;
  product.w = keys;
  product.w_stride = key_stride;
  product.init = product.y = space.scores + column;
  product.init_stride = product.y_stride = space.stride;
  dot_product(product);
}

// Adds the products of queries [first, first + rows) with a block of keys to their scores.
void score_block(const HeadAttention& job, const Workspace& space, const KeyBlock& block, int64_t first, int64_t rows) {
  if (has_few_queries(job)) {
    score_few(job, space, space.queries + job.queries * job.head_size,
              job.prefix_key + block.prefix_begin * job.head_size, job.head_size, block.prefix(), 0);
    score_few(job, space, space.queries, job.k + block.key_begin * job.k_stride, job.k_stride, block.keys(),
              block.prefix());
    return;
  }
  outer_product({.rows = rows,
                 .columns = block.padded(),
                 .depth = job.head_size,
                 .x = job.q + first * job.q_stride,
                 .x_stride = job.q_stride,
                 .w = space.keys,
                 .w_stride = space.stride,
                 .init = space.scores,
                 .init_stride = space.stride,
                 .y = space.scores,
                 .y_stride = space.stride});
}

// Queries [first, first + rows) and one block of keys.
void attend_block(const HeadAttention& job, const Workspace& space, const KeyBlock& block, int64_t first,
                  int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    start_row(job, block, first + i, space.scores + i * space.stride);
  }
  score_block(job, space, block, first, rows);
  for (int64_t i = 0; i < rows; ++i) {
    weigh_row(job, space, block, first + i, space.scores + i * space.stride);
  }
  // output += weights values, of the prefix, whose weights are gated, and of the sequence.
  float* output = job.output + first * job.output_stride;
  OuterProduct product{.rows = rows,
                       .columns = job.head_size,
                       .x_stride = space.stride,
                       .init = output,
                       .init_stride = job.output_stride,
                       .y = output,
                       .y_stride = job.output_stride};
  if (block.prefix() > 0) {
    for (int64_t i = 0; i < rows; ++i) {
      scale_row(space.scores + i * space.stride, block.prefix(), job.value_gate);
    }
    product.depth = block.prefix();
    product.x = space.scores;
    product.w = job.prefix_value + block.prefix_begin * job.head_size;
    product.w_stride = job.head_size;
    outer_product(product);
  }
  product.depth = block.keys();
  product.x = space.scores + block.prefix();
  product.w = job.v + block.key_begin * job.v_stride;
  product.w_stride = job.v_stride;
  outer_product(product);
}

}  // namespace

int64_t attention_workspace(const HeadAttention& job) {
  HeadAttention empty = job;
  float origin = 0.0F;
  empty.workspace = &origin;
  return Workspace(empty).end(empty) - &origin;
}

void attention(const HeadAttention& job) {
  const Workspace space(job);
  prefetch_rows(job.k, job.k_stride, job.keys, job.head_size);
  prefetch_rows(job.q, job.q_stride, job.queries, job.head_size);
  prefetch_rows(job.v, job.v_stride, job.keys, job.head_size);
  if (has_few_queries(job)) {
    scale_few(job, job.scale, space.queries);
    scale_few(job, job.key_gate * job.scale, space.queries + job.queries * job.head_size);
  } else {
    std::fill_n(space.gates, job.prefix, job.key_gate * job.scale);
    std::fill_n(space.scales, space.stride, job.scale);
  }
  std::fill_n(space.maxima, job.queries, -kInfinity);
  std::fill_n(space.sums, job.queries, 0.0F);
  for (int64_t query = 0; query < job.queries; ++query) {
    std::fill_n(job.output + query * job.output_stride, job.head_size, 0.0F);
  }
  for (int64_t begin = 0; begin < job.prefix + job.keys; begin += key_block_size(job)) {
    const KeyBlock block = key_block(job, begin);
    if (!has_few_queries(job)) {
      pack_keys(job, space, block);
    }
    for (int64_t first = 0; first < job.queries; first += kQueryBlock) {
      attend_block(job, space, block, first, std::min(kQueryBlock, job.queries - first));
    }
  }
  for (int64_t query = 0; query < job.queries; ++query) {
    const float sum = space.sums[query];
    scale_row(job.output + query * job.output_stride, job.head_size, sum == 0.0F ? 0.0F : 1.0F / sum);
    job.log_sum_exp[query * job.log_sum_exp_stride] = sum == 0.0F ? 0.0F : space.maxima[query] + std::log(sum);
  }
}

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
