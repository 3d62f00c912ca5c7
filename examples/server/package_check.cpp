#include "package_check.h"

#include "model.h"

#include <torchgraft/config/gate_pooling.h>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>
#include <vector>

namespace {

using torchgraft::AdapterPool;

constexpr size_t kLongestRow = 16;
constexpr double kNoise = 0.05;

// Adds noise to the rows of a lease, in all banks: fresh adapters change nothing, and would hide what is wrong.
void draw_rows(const AdapterPool::Lease& lease, at::Generator& generator) {
  const at::NoGradGuard no_grad;
  for (const auto& buffer : lease.module().named_buffers()) {
    if (!buffer.name.starts_with("adapters.") || !buffer.value.is_floating_point()) {
      continue;
    }
    for (const int64_t id : lease.ids()) {
      at::Tensor row = buffer.value.select(0, id);
      if (row.isfinite().all().item<bool>()) {
        row.add_(at::randn(row.sizes(), generator, row.options().dtype(at::kFloat)), kNoise);
      }
    }
  }
}

// What two orders of the same arithmetic may differ by, relative to the numbers.
double tolerance_of(const torch::jit::Module& module) {
  bool is_coarse = false;
  for (const at::Tensor& parameter : module.parameters()) {
    is_coarse = is_coarse || (parameter.is_floating_point() && parameter.element_size() < 4);
  }
  return is_coarse ? 0.1 : 1e-4;
}

class Comparison {
 public:
  Comparison(const std::string& path, const torch::jit::Module& model, const Signature& module,
             const Signature& package)
      : path_(path), tolerance_(tolerance_of(model)), module_(module), package_(package) {}

  // Compares rows of these adapters and of the base in one padded batch, and a row of `shortest` tokens.
  void run(const AdapterPool::Lease& lease, size_t longest, size_t shortest) {
    std::vector<int64_t> ids = lease.ids();
    ids.push_back(-1);
    TokenRows rows;
    for (size_t i = 0; i < ids.size(); ++i) {
      rows.push_back(draw_tokens(longest - std::min(longest - shortest, i % 3)));
    }
    compare(lease, rows, ids);
    compare(lease, {draw_tokens(shortest)}, {ids.front()});
  }

 private:
  std::vector<int64_t> draw_tokens(size_t count) {
    std::uniform_int_distribution<int64_t> token(0, module_.limits().vocabulary.value_or(2) - 1);
    std::vector<int64_t> tokens(count);
    std::generate(tokens.begin(), tokens.end(), [&] { return token(random_); });
    return tokens;
  }

  void compare(const AdapterPool::Lease& lease, const TokenRows& rows, const std::vector<int64_t>& ids) const {
    const at::NoGradGuard no_grad;
    const at::Tensor wanted = module_.run(lease.module(), rows, ids).states;
    at::Tensor got = package_.run(lease.module(), rows, ids).states;
    if (got.dim() == 3 && wanted.dim() == 3 && got.size(1) > wanted.size(1)) {  // padded for the package
      got = got.narrow(1, 0, wanted.size(1));
    }
    TORCH_CHECK(wanted.sizes() == got.sizes(), path_, ": gives a result of shape ", got.sizes(), ", and the model ",
                wanted.sizes(), "; make the package of this model");
    const double usual = std::max(std::sqrt(wanted.square().nan_to_num().mean().item<double>()), 1e-3);
    TORCH_CHECK(
        at::allclose(got, wanted, tolerance_, tolerance_ * usual, /*equal_nan=*/true), path_,
        ": gives other results than the model, by ", (got - wanted).abs().max().item<double>(),
        ": it was made of another model, or of a pool with other options; make it of this one, with as many rows");
  }

  const std::string path_;
  const double tolerance_;
  const Signature& module_;
  const Signature& package_;
  std::mt19937_64 random_{0};
};

// As many configurations at once as there are free rows.
void compare_all(AdapterPool& pool, const std::vector<torchgraft::AdapterConfig>& room, Comparison& comparison,
                 size_t longest, size_t shortest) {
  at::Generator generator = at::detail::createCPUGenerator(/*seed_val=*/0);
  const auto free = static_cast<size_t>(pool.stats().capacity - pool.stats().resident);
  for (size_t first = 0; first < room.size(); first += free) {
    std::vector<std::string> names;  // which no request can give
    const auto evict = c10::make_scope_exit(
        [&] { std::for_each(names.begin(), names.end(), [&](const std::string& name) { pool.evict(name); }); });
    for (size_t i = first; i < std::min(first + free, room.size()); ++i) {
      names.push_back("check/" + std::to_string(i));
      pool.insert({names.back(), room[i], std::nullopt, ""});
    }
    const AdapterPool::Lease lease = pool.acquire(names);
    draw_rows(lease, generator);
    comparison.run(lease, longest, shortest);
  }
}

}  // namespace

void fit_pool(torchgraft::AdapterPoolOptions& options, const PackageForm& form, bool has_capacity) {
  TORCH_CHECK(!has_capacity || options.capacity == form.capacity, "--capacity: the package has rows for ",
              form.capacity, " adapters, got ", options.capacity, "; leave it out, or make another package");
  for (const torchgraft::AdapterConfig& config : form.room) {
    const std::string& wanted = options.graft.gate_pooling;
    TORCH_CHECK(wanted.empty() || !torchgraft::has_gates(config) || config.gate_pooling == wanted,
                "--gate-pooling: the package's gates are means over ", config.gate_pooling, " tokens, got ", wanted,
                "; make the package of adapters that are served so (torchgraft export --gate-pooling)");
  }
  options.capacity = form.capacity;
  options.room = form.room;
  options.fixed_banks = true;
  options.max_compositions = 0;
}

std::unique_ptr<Package> open_package(const std::string& path, const PackageForm& form, AdapterStore& store,
                                      const torch::jit::Module& module, const ServiceOptions& options) {
  const Signature in_torchscript(module, options.pad_id);
  const auto positions = in_torchscript.limits().positions;
  const size_t tokens = positions ? std::min(options.tokens, static_cast<size_t>(*positions)) : options.tokens;
  check_sizes(form, options.batch.rows, tokens);
  auto package = std::make_unique<Package>(path, form, static_cast<size_t>(options.workers));
  const Signature in_package(module, options.pad_id, package.get());
  package->read_banks_of(store.pool().acquire({}).module());
  Comparison comparison(path, module, in_torchscript, in_package);
  const size_t least = package->least_tokens();
  TORCH_CHECK(
      least == 1 || in_package.takes_mask(), path, ": takes rows of ", least,
      " tokens or more, and the model takes no mask, so that shorter rows could not be padded; make it of a model "
      "that takes a mask, or serve without --package");
  const size_t shortest = package->pads_rows() ? 1 : least;
  compare_all(store.pool(), form.room, comparison, std::max(std::min(tokens, kLongestRow), shortest), shortest);
  return package;
}
