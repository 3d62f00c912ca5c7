// The operators by themselves: fused kernels beside ATen's compositions and beside what the base does anyway.
//
//   cmake -S . -B build -DTORCHGRAFT_BUILD_BENCHMARKS=ON && cmake --build build --target bench_ops
//   OMP_NUM_THREADS=1 build/bin/bench_ops --benchmark_enable_random_interleaving=true --benchmark_repetitions=9
//       --benchmark_report_aggregates_only=true
//
// Counters: GFLOP/s of the products alone, and their share of the best library product of this machine, measured here.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <benchmark/benchmark.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_lora_linear.h>
#include <torchgraft/ops/gated_prefix_attention.h>
#include <torchgraft/ops/kernel_mode.h>

#include <chrono>

namespace {

using torchgraft::ops::KernelMode;

// GFLOP/s of a large product of the library that ATen uses.
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
  at::Tensor x() const { return at::randn({1, tokens, hidden}); }
};

void linear(benchmark::State& state) {
  const Sizes size(state);
  const at::Tensor x = size.x();
  const at::Tensor weight = at::randn({size.hidden, size.hidden});
  const at::Tensor bias = at::randn({size.hidden});
  measure(state, KernelMode::kReference, 2.0 * size.tokens * size.hidden * size.hidden,
          [&] { benchmark::DoNotOptimize(at::linear(x, weight, bias)); });
}

void lora_linear(benchmark::State& state, KernelMode mode) {
  const Sizes size(state);
  constexpr int64_t kRank = 8;
  const at::Tensor x = size.x();
  const at::Tensor weight = at::randn({size.hidden, size.hidden});
  const at::Tensor bias = at::randn({size.hidden});
  const at::Tensor a = at::randn({1, kRank, size.hidden});
  const at::Tensor b = at::randn({1, size.hidden, kRank});
  const at::Tensor gate = at::randn({1, 1, size.hidden});
  const double flops = 2.0 * size.tokens * size.hidden * (size.hidden + 2 * kRank + 1);
  measure(state, mode, flops, [&] {
    benchmark::DoNotOptimize(
        torchgraft::ops::gated_lora_linear(x, weight, bias, a, b, at::ones({1}), gate, at::zeros({1, 1})));
  });
}

void lora(benchmark::State& state, KernelMode mode) {
  const Sizes size(state);
  constexpr int64_t kRank = 8;
  const at::Tensor x = size.x();
  const at::Tensor a = at::randn({1, kRank, size.hidden});
  const at::Tensor b = at::randn({1, size.hidden, kRank});
  const at::Tensor gate = at::randn({1, 1, size.hidden});
  measure(state, mode, 2.0 * size.tokens * size.hidden * (2 * kRank + 1), [&] {
    benchmark::DoNotOptimize(torchgraft::ops::gated_lora(x, x, a, b, at::ones({1}), gate, at::zeros({1, 1})));
  });
}

void bottleneck(benchmark::State& state, KernelMode mode, int64_t reduction) {
  const Sizes size(state);
  const int64_t narrow = size.hidden / reduction;
  const at::Tensor x = size.x();
  const at::Tensor down = at::randn({1, narrow, size.hidden});
  const at::Tensor up = at::randn({1, size.hidden, narrow});
  const at::Tensor gate = at::randn({1, 1, size.hidden});
  measure(state, mode, 2.0 * size.tokens * size.hidden * (2 * narrow + 1), [&] {
    benchmark::DoNotOptimize(torchgraft::ops::gated_bottleneck(x, x, down, at::zeros({1, narrow}), up,
                                                               at::zeros({1, size.hidden}), at::ones({1, 1}), "relu",
                                                               gate, at::zeros({1, 1})));
  });
}

// One row of `tokens`, heads of 64.
void attention(benchmark::State& state, KernelMode mode, int64_t prefix) {
  const Sizes size(state);
  constexpr int64_t kHead = 64;
  const int64_t heads = size.hidden / kHead;
  const at::Tensor x = size.x();
  const auto projected = [&] { return at::randn({1, size.tokens, heads, kHead}).transpose(1, 2); };
  const at::Tensor query = projected();
  const at::Tensor key = projected();
  const at::Tensor value = projected();
  const at::Tensor mask = at::zeros({1, 1, 1, size.tokens});
  const at::Tensor positions = at::randn({1, heads, prefix, kHead});
  const at::Tensor length = at::full({1}, prefix, at::kLong);
  measure(state, mode, 4.0 * size.tokens * size.hidden * static_cast<double>(size.tokens + prefix), [&] {
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

BENCHMARK(linear)->Apply(sizes);
BENCHMARK_CAPTURE(lora_linear, reference, KernelMode::kReference)->Apply(sizes);
BENCHMARK_CAPTURE(lora_linear, fused, KernelMode::kFused)->Apply(sizes);
BENCHMARK_CAPTURE(lora, reference, KernelMode::kReference)->Apply(sizes);
BENCHMARK_CAPTURE(lora, fused, KernelMode::kFused)->Apply(sizes);
BENCHMARK_CAPTURE(bottleneck, reference_16, KernelMode::kReference, 16)->Apply(sizes);
BENCHMARK_CAPTURE(bottleneck, fused_16, KernelMode::kFused, 16)->Apply(sizes);
BENCHMARK_CAPTURE(bottleneck, reference_2, KernelMode::kReference, 2)->Apply(sizes);
BENCHMARK_CAPTURE(bottleneck, fused_2, KernelMode::kFused, 2)->Apply(sizes);
BENCHMARK_CAPTURE(attention, no_prefix, KernelMode::kReference, 0)->Apply(attention_sizes);
BENCHMARK_CAPTURE(attention, reference_10, KernelMode::kReference, 10)->Apply(attention_sizes);
BENCHMARK_CAPTURE(attention, fused_10, KernelMode::kFused, 10)->Apply(attention_sizes);
BENCHMARK_CAPTURE(attention, fused_30, KernelMode::kFused, 30)->Apply(attention_sizes);

}  // namespace

BENCHMARK_MAIN();
