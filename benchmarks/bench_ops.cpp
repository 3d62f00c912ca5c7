// Measures the operators by themselves: fused kernels, ATen's compositions, and the base's own linear map and
// attention.
//
//   cmake -S . -B build -DTORCHGRAFT_BUILD_BENCHMARKS=ON && cmake --build build --target bench_ops
//   OMP_NUM_THREADS=1 build/bin/bench_ops --benchmark_enable_random_interleaving=true --benchmark_repetitions=9
//       --benchmark_report_aggregates_only=true
//
// Counters: GFLOP/s of the products alone, and their share of the best product of ATen's library on this machine.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <benchmark/benchmark.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/gated_bottleneck_linear.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_lora_linear.h>
#include <torchgraft/ops/gated_prefix_attention.h>
#include <torchgraft/ops/kernel_mode.h>
#include <torchgraft/ops/reft.h>

#include <algorithm>
#include <chrono>

namespace {

using torchgraft::ops::KernelMode;

// The best GFLOP/s of ten large products of the library that ATen uses.
double library_peak() {
  static const double peak = [] {
    const at::Tensor a = at::randn({1024, 1024});
    double best = 0.0;
    for (int i = 0; i < 10; ++i) {
      const auto start = std::chrono::steady_clock::now();
      benchmark::DoNotOptimize(at::mm(a, a));
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      best = std::max(best, 2e-9 * 1024 * 1024 * 1024 / seconds.count());
    }
    return best;
  }();
  return peak;
}

template <typename Run>
void measure(benchmark::State& state, KernelMode mode, double flops, const Run& run) {
  at::NoGradGuard no_grad;
  torchgraft::ops::set_kernel_mode(mode);
  run();
  for (auto _ : state) {
    run();
  }
  const double done = 1e-9 * flops * static_cast<double>(state.iterations());
  state.counters["GFLOP/s"] = benchmark::Counter(done, benchmark::Counter::kIsRate);
  state.counters["of_peak"] = benchmark::Counter(done / library_peak(), benchmark::Counter::kIsRate);
}

struct Sizes {
  int64_t tokens, hidden;
  explicit Sizes(const benchmark::State& state) : tokens(state.range(0)), hidden(state.range(1)) {}
};

// Which kernels run, and the dtype of their tensors.
struct Way {
  KernelMode mode;
  at::ScalarType type = at::kFloat;
  at::Tensor random(at::IntArrayRef sizes) const { return at::randn(sizes).to(type); }
  at::Tensor zeros(at::IntArrayRef sizes) const { return at::zeros(sizes, type); }
  at::Tensor ones(at::IntArrayRef sizes) const { return at::ones(sizes, type); }
};
constexpr Way kReference{KernelMode::kReference};
constexpr Way kFused{KernelMode::kFused};
constexpr Way kReferenceBFloat16{KernelMode::kReference, at::kBFloat16};
constexpr Way kFusedBFloat16{KernelMode::kFused, at::kBFloat16};

void linear(benchmark::State& state, Way way) {
  const Sizes size(state);
  const at::Tensor x = way.random({1, size.tokens, size.hidden});
  const at::Tensor weight = way.random({size.hidden, size.hidden});
  const at::Tensor bias = way.random({size.hidden});
  measure(state, way.mode, 2.0 * size.tokens * size.hidden * size.hidden,
          [&] { benchmark::DoNotOptimize(at::linear(x, weight, bias)); });
}

// `projections` projections of one input, with an operator for each. stacked: one operator for all of them, which
// bounds what a single read of the input, for projections and gate together, could gain.
void lora_linear(benchmark::State& state, Way way, int64_t projections = 1, bool stacked = false) {
  const Sizes size(state);
  const int64_t times = stacked ? projections : 1;
  const int64_t rank = 8 * times;
  const int64_t columns = size.hidden * times;
  const at::Tensor x = way.random({1, size.tokens, size.hidden});
  const at::Tensor weight = way.random({columns, size.hidden});
  const at::Tensor bias = way.random({columns});
  const at::Tensor a = way.random({1, rank, size.hidden});
  const at::Tensor b = way.random({1, columns, rank});
  const at::Tensor gate = way.random({1, 1, size.hidden});
  const at::Tensor scaling = way.ones({1});
  const at::Tensor gate_bias = way.zeros({1, 1});
  const double flops = 2.0 * size.tokens * size.hidden * static_cast<double>(projections * (size.hidden + 16 + 1));
  measure(state, way.mode, flops, [&] {
    for (int64_t i = 0; i < projections / times; ++i) {
      benchmark::DoNotOptimize(torchgraft::ops::gated_lora_linear(x, weight, bias, a, b, scaling, gate, gate_bias));
    }
  });
}

void lora(benchmark::State& state, Way way) {
  const Sizes size(state);
  constexpr int64_t kRank = 8;
  const at::Tensor x = way.random({1, size.tokens, size.hidden});
  const at::Tensor a = way.random({1, kRank, size.hidden});
  const at::Tensor b = way.random({1, size.hidden, kRank});
  const at::Tensor gate = way.random({1, 1, size.hidden});
  const at::Tensor scaling = way.ones({1});
  const at::Tensor gate_bias = way.zeros({1, 1});
  measure(state, way.mode, 2.0 * size.tokens * size.hidden * (2 * kRank + 1),
          [&] { benchmark::DoNotOptimize(torchgraft::ops::gated_lora(x, x, a, b, scaling, gate, gate_bias)); });
}

// Eight tokens are changed.
void reft(benchmark::State& state, Way way, int64_t rank) {
  const Sizes size(state);
  const int64_t changed = std::min<int64_t>(size.tokens, 4);
  const at::Tensor x = way.random({1, size.tokens, size.hidden});
  const at::Tensor unit = way.random({1, 2, rank, size.hidden});
  const at::Tensor bias = way.zeros({1, 2, rank});
  const at::Tensor positions = at::full({1, 2}, changed, at::kLong);
  measure(state, way.mode, 12.0 * changed * size.hidden * rank, [&] {
    benchmark::DoNotOptimize(torchgraft::ops::reft(x, unit, bias, unit, way.ones({1}), positions, "linear"));
  });
}

void bottleneck(benchmark::State& state, Way way, int64_t reduction) {
  const Sizes size(state);
  const int64_t narrow = size.hidden / reduction;
  const at::Tensor x = way.random({1, size.tokens, size.hidden});
  const at::Tensor down = way.random({1, narrow, size.hidden});
  const at::Tensor down_bias = way.zeros({1, narrow});
  const at::Tensor up = way.random({1, size.hidden, narrow});
  const at::Tensor up_bias = way.zeros({1, size.hidden});
  const at::Tensor scaling = way.ones({1, 1});
  const at::Tensor gate = way.random({1, 1, size.hidden});
  const at::Tensor gate_bias = way.zeros({1, 1});
  measure(state, way.mode, 2.0 * size.tokens * size.hidden * (2 * narrow + 1), [&] {
    benchmark::DoNotOptimize(
        torchgraft::ops::gated_bottleneck(x, x, down, down_bias, up, up_bias, scaling, "relu", gate, gate_bias));
  });
}

// The second linear map of a feed-forward block, which is four times as wide as the hidden size, and a parallel
// bottleneck beside it. reduction 0: without a bottleneck.
void feed_forward(benchmark::State& state, Way way, int64_t reduction) {
  const Sizes size(state);
  const int64_t wide = 4 * size.hidden;
  const int64_t narrow = reduction == 0 ? 0 : size.hidden / reduction;
  const at::Tensor x = way.random({1, size.tokens, size.hidden});
  const at::Tensor input = way.random({1, size.tokens, wide});
  const at::Tensor weight = way.random({size.hidden, wide});
  const at::Tensor bias = way.random({size.hidden});
  const at::Tensor down = way.random({1, narrow, size.hidden});
  const at::Tensor down_bias = way.zeros({1, narrow});
  const at::Tensor up = way.random({1, size.hidden, narrow});
  const at::Tensor up_bias = way.zeros({1, size.hidden});
  const at::Tensor scaling = way.ones({1, 1});
  measure(state, way.mode, 2.0 * size.tokens * size.hidden * (wide + 2 * narrow), [&] {
    if (reduction == 0) {
      benchmark::DoNotOptimize(at::linear(input, weight, bias));
    } else {
      benchmark::DoNotOptimize(torchgraft::ops::gated_bottleneck_linear(x, input, weight, bias, down, down_bias, up,
                                                                        up_bias, scaling, "relu"));
    }
  });
}

// Attention with one row of `tokens` tokens and heads of 64. prefix 0: attention without a prefix.
void attention(benchmark::State& state, Way way, int64_t prefix) {
  const Sizes size(state);
  constexpr int64_t kHead = 64;
  const int64_t heads = size.hidden / kHead;
  const at::Tensor x = way.random({1, size.tokens, size.hidden});
  const auto projected = [&] { return way.random({1, size.tokens, heads, kHead}).transpose(1, 2); };
  const at::Tensor query = projected();
  const at::Tensor key = projected();
  const at::Tensor value = projected();
  const at::Tensor mask = way.zeros({1, 1, 1, size.tokens});
  const at::Tensor positions = way.random({1, heads, prefix, kHead});
  const at::Tensor length = at::full({1}, prefix, at::kLong);
  measure(state, way.mode, 4.0 * size.tokens * size.hidden * static_cast<double>(size.tokens + prefix), [&] {
    if (prefix == 0) {
      benchmark::DoNotOptimize(at::scaled_dot_product_attention(query, key, value, mask));
    } else {
      benchmark::DoNotOptimize(
          torchgraft::ops::gated_prefix_attention(query, key, value, x, positions, positions, length, mask));
    }
  });
}

void sizes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"tokens", "hidden"})->ArgsProduct({{32, 128, 1024, 4096}, {384, 768}})->UseRealTime();
}

void attention_sizes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"tokens", "hidden"})->ArgsProduct({{16, 32, 128, 512, 2048}, {768}})->UseRealTime();
}

BENCHMARK_CAPTURE(linear, float32, kReference)->Apply(sizes);
BENCHMARK_CAPTURE(lora_linear, reference, kReference)->Apply(sizes);
BENCHMARK_CAPTURE(lora_linear, fused, kFused)->Apply(sizes);
BENCHMARK_CAPTURE(lora_linear, fused_twice, kFused, 2)->Apply(sizes);
BENCHMARK_CAPTURE(lora_linear, fused_stacked, kFused, 2, true)->Apply(sizes);
BENCHMARK_CAPTURE(lora, reference, kReference)->Apply(sizes);
BENCHMARK_CAPTURE(lora, fused, kFused)->Apply(sizes);
BENCHMARK_CAPTURE(reft, rank_4, kReference, 4)->Apply(sizes);
BENCHMARK_CAPTURE(bottleneck, reference_16, kReference, 16)->Apply(sizes);
BENCHMARK_CAPTURE(bottleneck, fused_16, kFused, 16)->Apply(sizes);
BENCHMARK_CAPTURE(bottleneck, reference_2, kReference, 2)->Apply(sizes);
BENCHMARK_CAPTURE(bottleneck, fused_2, kFused, 2)->Apply(sizes);
BENCHMARK_CAPTURE(feed_forward, linear, kReference, 0)->Apply(sizes);
BENCHMARK_CAPTURE(feed_forward, reference_2, kReference, 2)->Apply(sizes);
BENCHMARK_CAPTURE(feed_forward, fused_2, kFused, 2)->Apply(sizes);
BENCHMARK_CAPTURE(attention, no_prefix, kReference, 0)->Apply(attention_sizes);
BENCHMARK_CAPTURE(attention, reference_10, kReference, 10)->Apply(attention_sizes);
BENCHMARK_CAPTURE(attention, fused_10, kFused, 10)->Apply(attention_sizes);
BENCHMARK_CAPTURE(attention, fused_30, kFused, 30)->Apply(attention_sizes);

BENCHMARK_CAPTURE(linear, bfloat16, kReferenceBFloat16)->Apply(sizes);
BENCHMARK_CAPTURE(lora_linear, bfloat16_reference, kReferenceBFloat16)->Apply(sizes);
BENCHMARK_CAPTURE(lora_linear, bfloat16_fused, kFusedBFloat16)->Apply(sizes);
BENCHMARK_CAPTURE(lora, bfloat16_reference, kReferenceBFloat16)->Apply(sizes);
BENCHMARK_CAPTURE(lora, bfloat16_fused, kFusedBFloat16)->Apply(sizes);
BENCHMARK_CAPTURE(bottleneck, bfloat16_reference_16, kReferenceBFloat16, 16)->Apply(sizes);
BENCHMARK_CAPTURE(bottleneck, bfloat16_fused_16, kFusedBFloat16, 16)->Apply(sizes);
BENCHMARK_CAPTURE(bottleneck, bfloat16_reference_2, kReferenceBFloat16, 2)->Apply(sizes);
BENCHMARK_CAPTURE(bottleneck, bfloat16_fused_2, kFusedBFloat16, 2)->Apply(sizes);
BENCHMARK_CAPTURE(attention, bfloat16_no_prefix, kReferenceBFloat16, 0)->Apply(attention_sizes);
BENCHMARK_CAPTURE(attention, bfloat16_reference_10, kReferenceBFloat16, 10)->Apply(attention_sizes);
BENCHMARK_CAPTURE(attention, bfloat16_fused_10, kFusedBFloat16, 10)->Apply(attention_sizes);

}  // namespace

BENCHMARK_MAIN();
