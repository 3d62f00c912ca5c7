#include <torchgraft/patch/pool/pool_state.h>

#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/patch/adapters/dora.h>
#include <torchgraft/patch/module/check_applied_once.h>
#include <torchgraft/patch/module/place_dtypes.h>
#include <torchgraft/patch/pool/row_size.h>
#include <torchgraft/plan/saved_config.h>

#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <tuple>
#include <utility>

namespace torchgraft {
namespace {

using torch::jit::Module;
using Generation = PoolGeneration;
using Row = PoolRow;

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

std::shared_ptr<const Head> own_head(const Adapter& adapter) {
  return adapter.head ? std::make_shared<const Head>(*adapter.head) : nullptr;
}

std::vector<PoolShape> shapes_of(const Generation& generation) {
  std::vector<PoolShape> shapes;
  for (const PooledComposition& composition : generation.compositions) {
    shapes.push_back(composition.shape);
  }
  return shapes;
}

}  // namespace

PoolPins::~PoolPins() {
  if (!state) {
    return;
  }
  {
    const std::lock_guard lock(state->mutex);
    for (const int64_t number : rows) {
      Row& row = generation->rows[static_cast<size_t>(number)];
      if (--row.pins == 0 && row.use == Row::Use::kLeaving) {
        row.use = Row::Use::kFree;
      }
    }
    for (const size_t composition : compositions) {
      --generation->compositions[composition].pins;
    }
  }
  state->row_freed.notify_all();
}

PoolState::PoolState(const Module& module, AdapterPoolOptions given, AdapterPool::Loader fetch)
    : options(std::move(given)), loader(std::move(fetch)), base(open_draft(module, options.graft)) {
  const int64_t capacity = options.capacity;
  TORCH_CHECK(capacity >= 1, "AdapterPool: expected a capacity of at least 1, got ", capacity);
  TORCH_CHECK(options.max_row_bytes >= 0, "AdapterPool: expected max_row_bytes of at least 0, got ",
              options.max_row_bytes);
  TORCH_CHECK(options.max_compositions >= 0, "AdapterPool: expected max_compositions of at least 0, got ",
              options.max_compositions);
  TORCH_CHECK(!options.fixed_banks || options.max_compositions == 0,
              "AdapterPool: expected max_compositions of 0 with fixed_banks: a composition of another structure needs "
              "another module, got ",
              options.max_compositions, "; set one of the two");
  for (const NamedComposition& composition : std::exchange(base.compositions, {})) {
    check_pool_name(composition.name);
    check_composition(composition.tree, composition.name);
    compositions[composition.name] = composition.tree;
  }
  base.fusions.clear();
  base.options.rename.clear();  // base.module has the new names
  std::vector<Adapter> own;
  std::swap(own, base.adapters);
  TORCH_CHECK(static_cast<int64_t>(own.size()) < capacity, "AdapterPool: the module has ", own.size(),
              " adapters of its own, which stay: expected a capacity above that, got ", capacity);
  std::vector<AdapterConfig> room;
  check_own_pooling(own, base.options.gate_pooling);
  std::for_each(own.begin(), own.end(), [](const Adapter& adapter) { check_pool_name(adapter.name); });
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
  current = std::make_shared<Generation>(open_draft(base.module, base.options), std::move(room),
                                         std::vector<PoolShape>{}, capacity, options.max_row_bytes);
  for (const Adapter& adapter : own) {
    load(adapter, {}, /*permanent=*/true);
  }
}

Adapter PoolState::prepare(const AdapterSpec& spec) const {
  TORCH_CHECK(!spec.name.empty(), "AdapterPool: an adapter needs a name; the empty one is the base model");
  check_pool_name(spec.name);
  AdapterSpec frozen = spec;
  frozen.trainable = false;  // it becomes a row of the banks
  set_gate_pooling(frozen, base.options.gate_pooling, "AdapterPool");
  check_supported(frozen.config);
  check_least_bytes(make_plan(base.sites.structure, frozen.config), base.weights, options.max_row_bytes);
  Adapter adapter = make_placed_adapter(frozen, base.sites, base.module, base.weights);
  check_applied_once(adapter, base.sites, "AdapterPool");
  complete_dora(adapter, base.sites, base.module);
  return adapter;
}

// Waits until a lease ends. `start`: of all that the caller waits for.
void PoolState::wait_for_leases(std::unique_lock<std::mutex>& lock, std::chrono::steady_clock::time_point start,
                                const std::string& name) {
  if (!options.longest_wait) {
    row_freed.wait(lock);
    return;
  }
  const auto end = start + *options.longest_wait;
  if (std::chrono::steady_clock::now() >= end) {
    throw RowsInUse(
        {__func__, __FILE__, static_cast<uint32_t>(__LINE__)},
        c10::str("AdapterPool: no place for '", name, "': others have held all ", options.capacity, " rows for ",
                 options.longest_wait->count(), " ms; ask again later, or raise the capacity"));
  }
  row_freed.wait_until(lock, end);
}

// Finds a row for the adapter `name` and marks it kWriting. Other adapters in `wanted` keep their rows.
int64_t PoolState::take_row(const std::string& name, const Names& wanted) {
  const auto start = std::chrono::steady_clock::now();
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
        victim >= 0 || leaving, "AdapterPool: no row for '", name, "': all ", options.capacity,
        " hold adapters that came with the module or are asked for in the same call; raise the capacity, or ask "
        "for fewer at once");
    if (at_once || !leaving) {
      // An adapter in use loses its name now, so that no new lease can hold its row for ever.
      counts.evictions += rows[static_cast<size_t>(victim)].adapter.name == name ? 0 : 1;
      current->evict(victim);
    }
    if (!at_once) {
      wait_for_leases(lock, start, name);
    }
  }
}

// Writes a row and then moves the adapter's name to it. Grows the banks first when the adapter does not fit.
void PoolState::load(const Adapter& adapter, const Names& wanted, bool permanent) {
  if (const std::string lacks = current->banks.misfit(adapter); !lacks.empty()) {
    TORCH_CHECK(!options.fixed_banks, "AdapterPool: '", adapter.name,
                "' does not fit into the banks, which are fixed: ", lacks,
                "; make them for its configuration, too (room)");
    std::vector<AdapterConfig> room = current->banks.room();
    add_room(room, ejected_config(adapter.config));
    rebuild(std::move(room), shapes_of(*current));
  }
  const std::string why = current->banks.misfit(adapter);
  TORCH_INTERNAL_ASSERT(why.empty(), "banks made for '", adapter.name, "' cannot hold it: ", why);
  std::string form = form_of(adapter);
  Adapter described = without_weights(adapter);
  std::shared_ptr<const Head> head = own_head(adapter);
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
  row.form = std::move(form);
  row.use = Row::Use::kReady;
  ++counts.loads;
}

// Frees a row that could not be written.
void PoolState::free_row(int64_t number) {
  {
    const std::lock_guard lock(mutex);
    current->rows[static_cast<size_t>(number)].use = Row::Use::kFree;
  }
  row_freed.notify_all();
}

// Builds banks for the present adapters, with this room and these compositions, and moves over. Leases go on with the
// old banks.
void PoolState::rebuild(std::vector<AdapterConfig> room, const std::vector<PoolShape>& shapes) {
  const auto next = std::make_shared<Generation>(open_draft(base.module, base.options), std::move(room), shapes,
                                                 options.capacity, options.max_row_bytes);
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
    next->rows[static_cast<size_t>(number)] = {Row::Use::kReady, old.adapter, 0,       old.last_used,
                                               old.permanent,    old.form,    old.head};
    next->index[name] = number;
  }
  for (size_t i = 0; i < std::min(current->compositions.size(), next->compositions.size()); ++i) {
    const PooledComposition& old = current->compositions[i];
    PooledComposition& held = next->compositions[i];
    if (!old.name.empty() && old.shape == held.shape) {
      next->banks.compose(i, old.name, adapters_in(composition_from_string(old.text)), old.rows);
      held = {held.shape, old.name, old.text, old.rows, 0, old.last_used};
    }
  }
  current = next;
  ++counts.rebuilds;
}

}  // namespace torchgraft
