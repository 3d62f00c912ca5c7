#include <ATen/ATen.h>
#include <torchgraft/ops/cpu/expand.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/cpu/projection.h>
#include <torchgraft/ops/cpu/read_tokens.h>
#include <torchgraft/ops/cpu/token_tiles.h>

namespace torchgraft::ops::cpu {
namespace {

// Columns of the weight that one task computes: all where there are tokens enough for all threads, else a share.
int64_t columns_per_task(int64_t columns, int64_t tokens) {
  constexpr int64_t kTokensPerThread = 128;
  constexpr int64_t kMultiple = 24;  // of every register block's columns
  const int64_t threads = at::get_num_threads();
  if (threads == 1 || tokens >= kTokensPerThread * threads) {
    return columns;
  }
  const int64_t share = (columns + threads - 1) / threads;
  return std::min(columns, (share + kMultiple - 1) / kMultiple * kMultiple);
}

}  // namespace

LoraForward lora_projection(const at::Tensor& weight, const at::Tensor& bias, const LoraArguments& lora,
                            const Selection& selection) {
  const at::Tensor x = lora.x.contiguous();
  const at::Tensor projection = weight.contiguous();
  const int64_t tokens = x.size(1);
  const int64_t features = x.size(2);
  const int64_t columns = projection.size(0);
  at::Tensor output = at::empty({x.size(0), tokens, columns}, x.options());
  TokenReading reading;
  at::Tensor scaled;  // [B, S, r]: c (x A^T)
  TokenRuns runs{x.size(0) * tokens, {-1}};
  const bool adapted = selection.kind != Selection::Kind::kBase;
  if (adapted) {
    runs = token_runs(selection, x.size(0), tokens);
    reading = read_tokens(x, {lora.lora_a, {}}, lora.rows, selection);
    const std::vector<float> coefficients = row_coefficients(lora.scaling, reading.gate, runs, x.size(0));
    scaled = at::empty_like(reading.hidden);
    scale_rows(reading.hidden.const_data_ptr<float>(), x.size(0) * tokens, scaled.size(2), coefficients, 0, tokens,
               scaled.mutable_data_ptr<float>(), scaled.size(2));
  }
  const BankSlices lora_b(adapted ? lora.lora_b : at::Tensor());
  const at::Tensor dense_bias = bias.defined() ? bias.contiguous() : bias;
  const int64_t share = columns_per_task(columns, runs.count() * runs.tokens);
  const int64_t shares = (columns + share - 1) / share;
  const int64_t tile = shares > 1 ? std::max<int64_t>(runs.tokens, 1) : 64;
  const int64_t per_run = (runs.tokens + tile - 1) / tile;
  const Numbers from = numbers_of(x);
  const Numbers rows = numbers_of(projection);
  const Numbers offsets = numbers_of(dense_bias);
  const float* narrow = adapted ? scaled.const_data_ptr<float>() : nullptr;
  const int64_t element = output.element_size();
  auto* to = static_cast<char*>(output.mutable_data_ptr());

  at::parallel_for(0, runs.count() * per_run * shares, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % shares * share;
      const int64_t run = task / shares / per_run;
      const int64_t in_run = task / shares % per_run * tile;
      const int64_t first = run * runs.tokens + in_run;
      DotProduct job;
      job.rows = std::min(tile, runs.tokens - in_run);
      job.columns = std::min(share, columns - column);
      job.depth = job.x_stride = job.w_stride = features;
      const FloatView tokens_at_hand(from + first * features, job.rows * features);
      FloatResult result(from.is_bfloat16, to + (first * columns + column) * element, job.rows, job.columns, columns);
      job.x = tokens_at_hand.data();
      job.w = rows + column * features;
      job.y = result.data();
      job.y_stride = result.stride();
      job.bias = offsets ? offsets + column : offsets;
      if (const int64_t adapter = runs.adapters[run]; adapter >= 0) {
        const int64_t rank = scaled.size(2);
        job.depth2 = job.x2_stride = job.w2_stride = rank;
        job.x2 = narrow + first * rank;
        job.w2 = lora_b.of(adapter) + column * rank;
      }
      kernels().dot_product(job);
      result.store();
    }
  });
  return {output, reading.gate, adapted ? reading.hidden.to(x.scalar_type()) : reading.hidden};
}

}  // namespace torchgraft::ops::cpu
