#include <torchgraft/patch/adapter_pool.h>

#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/patch/adapters/dora.h>
#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/module/check_applied_once.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/head_logits.h>
#include <torchgraft/patch/pool/pool_generation.h>
#include <torchgraft/patch/pool/row_size.h>
#include <torchgraft/plan/saved_config.h>

#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <tuple>

namespace torchgraft {
namespace {

using torch::jit::Module;
using Generation = PoolGeneration;
using Row = PoolRow;
using Names = std::set<std::string>;

void add_room(std::vector<AdapterConfig>& room, const AdapterConfig& config) {
  const std::string json = config_to_json(config);
  const bool known =
      std::any_of(room.begin(), room.end(), [&](const AdapterConfig& other) { return config_to_json(other) == json; });
  if (!known) {
    room.push_back(config);
  }
}

Adapter without_weights(const Adapter& adapter) {
  return {adapter.name, adapter.config, adapter.plan, {}, adapter.merged};
}

// Adapters of the module keep what they have: others would be ignored in silence.
void check_own_pooling(const std::vector<Adapter>& own, const std::string& wanted) {
  for (const Adapter& adapter : own) {
    TORCH_CHECK(wanted.empty() || !has_gates(adapter.config) || adapter.config.gate_pooling == wanted,
                "AdapterPool: expected gate_pooling=\"", wanted, "\" of all adapters, but the gates of '", adapter.name,
                "', which came with the module, are means over \"", adapter.config.gate_pooling,
                "\" tokens; leave gate_pooling out, so that each adapter keeps its own");
  }
}

std::shared_ptr<const Head> head_of(const Adapter& adapter) {
  return adapter.head ? std::make_shared<const Head>(*adapter.head) : nullptr;
}

}  // namespace

struct AdapterPool::State {
  State(const Module& module, AdapterPoolOptions options, Loader loader);

  Adapter prepare(const AdapterSpec& spec) const;
  std::optional<Lease> try_acquire(const std::shared_ptr<State>& self, const std::vector<std::string>& names);
  // The caller of these holds `loading`.
  void load(const Adapter& adapter, const Names& wanted, bool permanent);
  void grow(const AdapterConfig& config);
  int64_t take_row(const std::string& name, const Names& wanted);
  void free_row(int64_t number);

  const int64_t capacity;
  const int64_t max_row_bytes;
  const Loader loader;
  // The base, for planning adapters and building banks; nothing is grafted onto it.
  Draft base;

  std::mutex loading;  // taken before `mutex`: one thread at a time fetches adapters and writes rows

  mutable std::mutex mutex;  // guards what follows, and the rows and the index of every generation
  std::condition_variable row_freed;
  std::shared_ptr<Generation> current;
  uint64_t clock = 0;
  AdapterPoolStats counts;
};

struct AdapterPool::Lease::Held {
  std::shared_ptr<State> state;
  std::shared_ptr<Generation> generation;
  std::vector<int64_t> rows;                       // each once
  std::vector<std::shared_ptr<const Head>> heads;  // one for each name

  // Whoever makes a Held pins its rows. The destructor takes the mutex and removes the pins.
  Held(std::shared_ptr<State> owner, std::shared_ptr<Generation> held, std::vector<int64_t> pinned,
       std::vector<std::shared_ptr<const Head>> heads_of_names)
      : state(std::move(owner)),
        generation(std::move(held)),
        rows(std::move(pinned)),
        heads(std::move(heads_of_names)) {}
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  ~Held() {
    {
      const std::lock_guard lock(state->mutex);
      for (const int64_t number : rows) {
        Row& row = generation->rows[static_cast<size_t>(number)];
        if (--row.pins == 0 && row.use == Row::Use::kLeaving) {
          row.use = Row::Use::kFree;
        }
      }
    }
    state->row_freed.notify_all();
  }
};

AdapterPool::Lease::Lease(std::unique_ptr<Held> held, std::vector<int64_t> ids)
    : held_(std::move(held)), ids_(std::move(ids)) {}
AdapterPool::Lease::Lease(Lease&&) noexcept = default;
AdapterPool::Lease& AdapterPool::Lease::operator=(Lease&&) noexcept = default;
AdapterPool::Lease::~Lease() = default;

const Module& AdapterPool::Lease::module() const { return held_->generation->banks.module(); }

bool AdapterPool::Lease::same_module(const Lease& other) const { return held_->generation == other.held_->generation; }

const HeadConfig* AdapterPool::Lease::head(size_t position) const {
  const auto& head = held_->heads.at(position);
  return head ? &head->config : nullptr;
}

at::Tensor AdapterPool::Lease::logits(size_t position, const at::Tensor& hidden, const at::Tensor& token_mask) const {
  const auto& head = held_->heads.at(position);
  TORCH_CHECK(head, "AdapterPool: the adapter at position ", position, " has no head");
  return head_logits(*head, hidden, token_mask);
}

AdapterPool::State::State(const Module& module, AdapterPoolOptions options, Loader fetch)
    : capacity(options.capacity),
      max_row_bytes(options.max_row_bytes),
      loader(std::move(fetch)),
      base(open_draft(module, options.graft)) {
  TORCH_CHECK(capacity >= 1, "AdapterPool: expected a capacity of at least 1, got ", capacity);
  TORCH_CHECK(max_row_bytes >= 0, "AdapterPool: expected max_row_bytes of at least 0, got ", max_row_bytes);
  TORCH_CHECK(base.compositions.empty(), "AdapterPool: the module has the composition '",
              base.compositions.empty() ? "" : base.compositions.front().name,
              "', which no pool can hold yet; remove it, or serve the module itself");
  base.options.rename.clear();  // base.module has the new names
  std::vector<Adapter> own;
  std::swap(own, base.adapters);
  TORCH_CHECK(static_cast<int64_t>(own.size()) < capacity, "AdapterPool: the module has ", own.size(),
              " adapters of its own, which stay: expected a capacity above that, got ", capacity);
  std::vector<AdapterConfig> room;
  check_own_pooling(own, base.options.gate_pooling);
  for (const AdapterConfig& config : options.room) {
    AdapterConfig row = ejected_config(config);
    row.gate_pooling = base.options.gate_pooling.empty() ? row.gate_pooling : base.options.gate_pooling;
    add_room(room, row);
  }
  for (Adapter& adapter : own) {
    adapter.trainable = false;  // it becomes a row of the banks, with DoRA's norms as they are now
    adapter.sources.clear();
    complete_dora(adapter, base.sites, base.module);
    add_room(room, ejected_config(adapter.config));
  }
  current =
      std::make_shared<Generation>(open_draft(base.module, base.options), std::move(room), capacity, max_row_bytes);
  for (const Adapter& adapter : own) {
    load(adapter, {}, /*permanent=*/true);
  }
}

Adapter AdapterPool::State::prepare(const AdapterSpec& spec) const {
  TORCH_CHECK(!spec.name.empty(), "AdapterPool: an adapter needs a name; the empty one is the base model");
  AdapterSpec frozen = spec;
  frozen.trainable = false;  // it becomes a row of the banks
  set_gate_pooling(frozen, base.options.gate_pooling, "AdapterPool");
  check_supported(frozen.config);
  check_least_bytes(make_plan(base.sites.structure, frozen.config), base.weights, max_row_bytes);
  Adapter adapter = make_adapter(frozen, base.sites.structure, base.weights);
  check_applied_once(adapter, base.sites, "AdapterPool");
  complete_dora(adapter, base.sites, base.module);
  return adapter;
}

std::optional<AdapterPool::Lease> AdapterPool::State::try_acquire(const std::shared_ptr<State>& self,
                                                                  const std::vector<std::string>& names) {
  const std::lock_guard lock(mutex);
  std::vector<int64_t> ids;
  for (const std::string& name : names) {
    const auto found = current->index.find(name);
    if (!name.empty() && found == current->index.end()) {
      return std::nullopt;
    }
    ids.push_back(name.empty() ? -1 : found->second);
  }
  std::set<int64_t> rows(ids.begin(), ids.end());
  rows.erase(-1);
  std::vector<std::shared_ptr<const Head>> heads;
  for (const int64_t number : ids) {
    heads.push_back(number < 0 ? nullptr : current->rows[static_cast<size_t>(number)].head);
  }
  // From here on nothing may throw: the destructor of a Held whose rows are not pinned yet would remove pins that
  // others hold, and would wait for the mutex.
  auto held =
      std::make_unique<Lease::Held>(self, current, std::vector<int64_t>(rows.begin(), rows.end()), std::move(heads));
  for (const int64_t number : held->rows) {
    Row& row = current->rows[static_cast<size_t>(number)];
    ++row.pins;
    row.last_used = ++clock;
  }
  return Lease(std::move(held), std::move(ids));
}

// Finds a row for the adapter `name` and marks it kWriting. Other adapters in `wanted` keep their rows.
int64_t AdapterPool::State::take_row(const std::string& name, const Names& wanted) {
  std::unique_lock lock(mutex);
  std::vector<Row>& rows = current->rows;
  const auto may_leave = [&](const Row& row) {
    return row.use == Row::Use::kReady && !row.permanent &&
           (row.adapter.name == name || !wanted.count(row.adapter.name));
  };
  for (;;) {
    int64_t victim = -1;
    bool leaving = false;
    for (size_t i = 0; i < rows.size(); ++i) {
      Row& row = rows[i];
      if (row.use == Row::Use::kFree) {
        row.use = Row::Use::kWriting;
        return static_cast<int64_t>(i);
      }
      leaving = leaving || row.use == Row::Use::kLeaving;
      const auto order = [&](const Row& candidate) {
        return std::tuple(candidate.pins > 0, candidate.adapter.name != name, candidate.last_used);
      };
      if (may_leave(row) && (victim < 0 || order(row) < order(rows[static_cast<size_t>(victim)]))) {
        victim = static_cast<int64_t>(i);
      }
    }
    const bool at_once = victim >= 0 && rows[static_cast<size_t>(victim)].pins == 0;
    TORCH_CHECK(
        victim >= 0 || leaving, "AdapterPool: no row for '", name, "': all ", capacity,
        " hold adapters that came with the module or are asked for in the same call; raise the capacity, or ask "
        "for fewer at once");
    if (at_once || !leaving) {
      // An adapter in use loses its name now, so that no new lease can hold its row for ever.
      counts.evictions += rows[static_cast<size_t>(victim)].adapter.name == name ? 0 : 1;
      current->evict(victim);
    }
    if (!at_once) {
      row_freed.wait(lock);
    }
  }
}

// Writes a row and then moves the adapter's name to it. Grows the banks first when the adapter does not fit.
void AdapterPool::State::load(const Adapter& adapter, const Names& wanted, bool permanent) {
  if (!current->banks.misfit(adapter).empty()) {
    grow(ejected_config(adapter.config));
  }
  const std::string why = current->banks.misfit(adapter);
  TORCH_INTERNAL_ASSERT(why.empty(), "banks made for '", adapter.name, "' cannot hold it: ", why);
  Adapter described = without_weights(adapter);
  std::shared_ptr<const Head> head = head_of(adapter);
  const int64_t number = take_row(adapter.name, wanted);
  auto give_back = c10::make_scope_exit([&] { free_row(number); });
  current->banks.write(number, adapter);

  const std::lock_guard lock(mutex);
  const auto [entry, is_new] = current->index.try_emplace(adapter.name, number);
  give_back.release();
  if (!is_new) {
    permanent = permanent || current->rows[static_cast<size_t>(entry->second)].permanent;
    current->release(entry->second);
    entry->second = number;
  }
  Row& row = current->rows[static_cast<size_t>(number)];
  row.adapter = std::move(described);
  row.head = std::move(head);
  row.last_used = ++clock;
  row.permanent = permanent;
  row.use = Row::Use::kReady;
  ++counts.loads;
}

// Frees a row that could not be written.
void AdapterPool::State::free_row(int64_t number) {
  {
    const std::lock_guard lock(mutex);
    current->rows[static_cast<size_t>(number)].use = Row::Use::kFree;
  }
  row_freed.notify_all();
}

// Builds banks for the present adapters and for adapters of `config`, and moves over. Leases go on with the old banks.
void AdapterPool::State::grow(const AdapterConfig& config) {
  std::vector<AdapterConfig> room = current->banks.room();
  add_room(room, config);
  const auto next =
      std::make_shared<Generation>(open_draft(base.module, base.options), std::move(room), capacity, max_row_bytes);
  std::map<std::string, int64_t> residents;
  {
    const std::lock_guard lock(mutex);
    residents = current->index;
  }
  for (const auto& [name, number] : residents) {
    Adapter adapter = current->rows[static_cast<size_t>(number)].adapter;
    adapter.weights = current->banks.read(number, adapter.plan);
    next->banks.write(number, adapter);
  }
  const std::lock_guard lock(mutex);
  for (const auto& [name, number] : current->index) {  // some of `residents`: others may have been evicted meanwhile
    const Row& old = current->rows[static_cast<size_t>(number)];
    next->rows[static_cast<size_t>(number)] = {Row::Use::kReady, old.adapter,   0,
                                               old.last_used,    old.permanent, old.head};
    next->index[name] = number;
  }
  current = next;
  ++counts.rebuilds;
}

AdapterPool::AdapterPool(const Module& module, AdapterPoolOptions options, Loader loader)
    : state_(std::make_shared<State>(module, std::move(options), std::move(loader))) {}

AdapterPool::~AdapterPool() = default;

std::optional<AdapterPool::Lease> AdapterPool::try_acquire(const std::vector<std::string>& names) {
  return state_->try_acquire(state_, names);
}

AdapterPool::Lease AdapterPool::acquire(const std::vector<std::string>& names) {
  if (auto lease = try_acquire(names)) {
    return std::move(*lease);
  }
  const std::lock_guard loading(state_->loading);
  Names wanted(names.begin(), names.end());
  wanted.erase("");
  for (;;) {
    if (auto lease = try_acquire(names)) {
      return std::move(*lease);
    }
    // Each turn loads one of the names, and none of them loses its row to another.
    const std::vector<std::string> known = resident();
    const auto missing = std::find_if(wanted.begin(), wanted.end(), [&](const std::string& name) {
      return !std::binary_search(known.begin(), known.end(), name);
    });
    if (missing == wanted.end()) {
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

void AdapterPool::insert(const AdapterSpec& spec) {
  const std::lock_guard loading(state_->loading);
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

AdapterPoolStats AdapterPool::stats() const {
  const std::lock_guard lock(state_->mutex);
  AdapterPoolStats result = state_->counts;
  result.capacity = state_->capacity;
  result.resident = static_cast<int64_t>(state_->current->index.size());
  result.row_bytes = state_->current->banks.row_bytes();
  result.bank_bytes = result.row_bytes * result.capacity;
  return result;
}

}  // namespace torchgraft
