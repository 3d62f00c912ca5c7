#include <torchgraft/patch/adapter_pool.h>

#include <torchgraft/patch/module/head_logits.h>
#include <torchgraft/patch/pool/pool_state.h>

#include <algorithm>
#include <mutex>
#include <utility>

namespace torchgraft {

using torch::jit::Module;

AdapterPool::Lease::Lease(std::unique_ptr<PoolPins> held) : held_(std::move(held)) {}
AdapterPool::Lease::Lease(Lease&&) noexcept = default;
AdapterPool::Lease& AdapterPool::Lease::operator=(Lease&&) noexcept = default;
AdapterPool::Lease::~Lease() = default;

const Module& AdapterPool::Lease::module() const { return held_->generation->banks.module(); }

const std::vector<int64_t>& AdapterPool::Lease::ids() const { return held_->ids; }

bool AdapterPool::Lease::same_module(const Lease& other) const { return held_->generation == other.held_->generation; }

const HeadConfig* AdapterPool::Lease::head(size_t position) const {
  const auto& head = held_->heads.at(position);
  return head ? &head->config : nullptr;
}

bool AdapterPool::Lease::splits_inputs(size_t position) const { return held_->splits.at(position); }

at::Tensor AdapterPool::Lease::logits(size_t position, const at::Tensor& hidden, const at::Tensor& token_mask) const {
  const auto& head = held_->heads.at(position);
  TORCH_CHECK(head, "AdapterPool: the adapter at position ", position, " has no head");
  return head_logits(*head, hidden, token_mask);
}

AdapterPool::AdapterPool(const Module& module, AdapterPoolOptions options, Loader loader)
    : state_(std::make_shared<PoolState>(module, std::move(options), std::move(loader))) {}

AdapterPool::~AdapterPool() = default;

std::optional<AdapterPool::Lease> AdapterPool::lease(const std::vector<PoolRequest>& requests) {
  auto pins = state_->pin(state_, requests);
  return pins ? std::optional<Lease>(Lease(std::move(pins))) : std::nullopt;
}

std::optional<AdapterPool::Lease> AdapterPool::try_acquire(const std::vector<std::string>& names) {
  return lease(state_->requests(names));
}

AdapterPool::Lease AdapterPool::acquire(const std::vector<std::string>& names) {
  if (auto ready = try_acquire(names)) {
    return std::move(*ready);
  }
  const std::lock_guard loading(state_->loading);
  const std::vector<PoolRequest> requests = state_->requests(names);  // now compose() gives no name to another
  PoolState::Names wanted;
  for (const PoolRequest& request : requests) {
    wanted.insert(request.parts.begin(), request.parts.end());
  }
  for (;;) {
    if (auto ready = lease(requests)) {
      return std::move(*ready);
    }
    // Each turn loads one of the adapters, and none of them loses its row to another.
    const std::vector<std::string> known = resident();
    const auto missing = std::find_if(wanted.begin(), wanted.end(), [&](const std::string& name) {
      return !std::binary_search(known.begin(), known.end(), name);
    });
    if (missing == wanted.end()) {
      for (const PoolRequest& request : requests) {
        if (request.tree) {
          state_->bring(request, requests);
        }
      }
      continue;
    }
    TORCH_CHECK(state_->loader, "AdapterPool: no adapter '", *missing,
                "' is in memory: it was never inserted, or gave ",
                "its row up for another one; insert it (again). In memory: ", c10::Join(", ", known));
    const AdapterSpec spec = state_->loader(*missing);
    TORCH_CHECK(spec.name == *missing, "AdapterPool: expected an adapter called '", *missing, "', the loader gave '",
                spec.name, "'");
    state_->load(state_->prepare(spec), wanted, /*permanent=*/false);
  }
}

void AdapterPool::compose(const std::string& name, const Composition& tree) {
  TORCH_CHECK(!name.empty(), "AdapterPool: a composition needs a name; the empty one is the base model");
  check_pool_name(name);
  state_->check_composition(tree, name);
  const std::vector<std::string> parts = adapters_in(tree);
  TORCH_CHECK(std::find(parts.begin(), parts.end(), name) == parts.end(), "AdapterPool: the composition ",
              composition_to_string(tree), " uses the adapter '", name, "' and cannot have the same name; give it ",
              "another one");
  const std::lock_guard loading(state_->loading);
  const std::lock_guard lock(state_->mutex);
  TORCH_CHECK(!state_->current->index.count(name), "AdapterPool: an adapter is called '", name,
              "'; evict it first, or give the composition another name");
  for (const std::string& part : parts) {
    TORCH_CHECK(!state_->compositions.count(part), "AdapterPool: '", name, "', ", composition_to_string(tree),
                ", uses '", part, "', which is a composition; name its adapters");
  }
  state_->compositions[name] = tree;
}

bool AdapterPool::remove_composition(const std::string& name) {
  const std::lock_guard lock(state_->mutex);
  return state_->compositions.erase(name) > 0;
}

std::map<std::string, std::string> AdapterPool::compositions() const {
  const std::lock_guard lock(state_->mutex);
  std::map<std::string, std::string> result;
  for (const auto& [name, tree] : state_->compositions) {
    result[name] = composition_to_string(tree);
  }
  return result;
}

void AdapterPool::insert(const AdapterSpec& spec) {
  const std::lock_guard loading(state_->loading);
  {
    const std::lock_guard lock(state_->mutex);
    TORCH_CHECK(!state_->compositions.count(spec.name), "AdapterPool: a composition is called '", spec.name,
                "'; remove it first (remove_composition), or give the adapter another name");
  }
  state_->load(state_->prepare(spec), {}, /*permanent=*/false);
}

bool AdapterPool::evict(const std::string& name) {
  {
    const std::lock_guard lock(state_->mutex);
    const auto found = state_->current->index.find(name);
    if (found == state_->current->index.end()) {
      return false;
    }
    TORCH_CHECK(!state_->current->rows[static_cast<size_t>(found->second)].permanent, "AdapterPool: '", name,
                "' came with the module and stays");
    state_->current->evict(found->second);
  }
  state_->row_freed.notify_all();
  return true;
}

std::vector<std::string> AdapterPool::resident() const {
  const std::lock_guard lock(state_->mutex);
  std::vector<std::string> names;
  for (const auto& [name, row] : state_->current->index) {
    names.push_back(name);
  }
  return names;
}

std::vector<AdapterConfig> AdapterPool::room() const {
  const std::lock_guard lock(state_->mutex);
  return state_->current->banks.room();
}

std::string AdapterPool::misfit(const AdapterConfig& config) const {
  const Adapter adapter = state_->prepare({"room", config, std::nullopt, ""});
  const std::lock_guard lock(state_->mutex);
  return state_->current->banks.misfit(adapter);
}

AdapterPoolStats AdapterPool::stats() const {
  const std::lock_guard lock(state_->mutex);
  AdapterPoolStats result = state_->counts;
  result.capacity = state_->options.capacity;
  result.resident = static_cast<int64_t>(state_->current->index.size());
  result.row_bytes = state_->current->banks.row_bytes();
  result.bank_bytes = result.row_bytes * result.capacity;
  for (const PooledComposition& composition : state_->current->compositions) {
    result.compositions += !composition.name.empty();
  }
  return result;
}

}  // namespace torchgraft
