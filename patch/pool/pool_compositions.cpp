#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/pool/pool_state.h>
#include <torchgraft/registration/parse_json.h>

#include <algorithm>
#include <tuple>
#include <utility>

namespace torchgraft {
namespace {

constexpr BlockKind kPooledBlocks[] = {BlockKind::kStack, BlockKind::kAverage, BlockKind::kSplit,
                                       BlockKind::kBatchSplit};

int64_t depth_of(const Composition& tree) {
  int64_t deepest = 0;
  for (const Composition& child : tree.children) {
    deepest = std::max(deepest, depth_of(child));
  }
  return tree.kind == BlockKind::kAdapter ? 0 : deepest + 1;
}

int64_t leaves_of(const Composition& tree) {
  int64_t count = tree.kind == BlockKind::kAdapter ? 1 : 0;
  for (const Composition& child : tree.children) {
    count += leaves_of(child);
  }
  return count;
}

void check_blocks(const Composition& tree, const std::string& name) {
  if (tree.kind == BlockKind::kAdapter) {
    return;
  }
  TORCH_CHECK(tree.kind != BlockKind::kFuse, "AdapterPool: '", name, "': ", composition_to_string(tree),
              " needs AdapterFusion layers, which no pool holds yet; serve it from a module of its own (compose)");
  TORCH_CHECK(tree.kind != BlockKind::kParallel, "AdapterPool: '", name, "': no pool holds a Parallel; acquire each ",
              "of its parts, and repeat the rows for each (a module's own: remove_adapter takes it out)");
  TORCH_CHECK(tree.kind != BlockKind::kMultiTask, "AdapterPool: '", name, "': no pool holds a MultiTask; acquire for ",
              "each row the part of its task (a module's own: remove_adapter takes it out)");
  TORCH_INTERNAL_ASSERT(std::find(std::begin(kPooledBlocks), std::end(kPooledBlocks), tree.kind) !=
                        std::end(kPooledBlocks));
  for (const Composition& child : tree.children) {
    check_blocks(child, name);
  }
}

// The adapter whose head rows of the composition have: the one that ends a Stack.
const std::string* head_owner(const Composition& tree) {
  const bool ends_with_one = tree.kind == BlockKind::kStack && tree.children.back().kind == BlockKind::kAdapter;
  return ends_with_one ? &tree.children.back().name : nullptr;
}

}  // namespace

void check_pool_name(const std::string& name) {
  TORCH_CHECK(!is_composition_text(name), "AdapterPool: '", shown_text(name),
              "' cannot be a name: it is the text of a ",
              "composition; give it another one (of a module's adapter or composition: rename_adapter)");
}

void PoolState::check_composition(const Composition& tree, const std::string& name) const {
  torchgraft::check_composition(tree, "AdapterPool");
  check_blocks(tree, name);
  TORCH_CHECK(
      options.max_compositions > 0, "AdapterPool: '", name, "' is a composition, of which this pool holds none; ",
      options.fixed_banks ? "its banks are fixed (a server with --package runs none)" : "raise max_compositions");
  const int64_t depth = depth_of(tree);
  TORCH_CHECK(depth <= options.max_composition_depth, "AdapterPool: '", name, "': expected at most ",
              options.max_composition_depth, " blocks one in another, got ", depth, "; raise max_composition_depth");
  const int64_t leaves = leaves_of(tree);
  TORCH_CHECK(leaves <= options.max_composition_parts, "AdapterPool: '", name, "': expected at most ",
              options.max_composition_parts, " adapters in a composition, got ", leaves,
              "; raise max_composition_parts");
}

std::vector<PoolRequest> PoolState::requests(const std::vector<std::string>& names) const {
  std::vector<PoolRequest> result;
  for (const std::string& name : names) {
    PoolRequest& request = result.emplace_back(PoolRequest{name});
    if (is_composition_text(name)) {
      request.tree = composition_from_string(name);
      request.name = composition_to_string(*request.tree);
      check_composition(*request.tree, request.name);
    }
  }
  const std::lock_guard lock(mutex);  // one for all names: compose() may give some meanwhile
  for (PoolRequest& request : result) {
    if (const auto found = compositions.find(request.name); !request.tree && found != compositions.end()) {
      request.tree = found->second;
    }
    if (request.tree) {
      request.text = composition_to_string(*request.tree);
      request.parts = adapters_in(*request.tree);
    } else if (!request.name.empty()) {
      request.parts = {request.name};
    }
    TORCH_CHECK(static_cast<int64_t>(request.parts.size()) <= options.capacity, "AdapterPool: ", request.text, " has ",
                request.parts.size(), " adapters, and the pool holds at most ", options.capacity,
                " at once; raise the capacity");
    for (const std::string& part : request.parts) {
      TORCH_CHECK(!compositions.count(part), "AdapterPool: ", request.text, " uses '", part,
                  "', which is a composition; name its adapters");
    }
  }
  return result;
}

std::unique_ptr<PoolPins> PoolState::pin(const std::shared_ptr<PoolState>& self,
                                         const std::vector<PoolRequest>& requests) {
  auto pins = std::make_unique<PoolPins>();
  const std::lock_guard lock(mutex);
  std::set<int64_t> rows;
  std::set<size_t> composed;
  for (const PoolRequest& request : requests) {
    const auto numbers = current->rows_of(request.parts);
    if (!numbers) {
      return nullptr;
    }
    rows.insert(numbers->begin(), numbers->end());
    const std::string* owner = request.tree ? head_owner(*request.tree) : &request.name;
    const auto headed = owner ? current->index.find(*owner) : current->index.end();
    pins->heads.push_back(headed == current->index.end() ? nullptr
                                                         : current->rows[static_cast<size_t>(headed->second)].head);
    pins->splits.push_back(request.tree && splits_inputs(*request.tree));
    if (!request.tree) {
      pins->ids.push_back(numbers->empty() ? -1 : numbers->front());
      continue;
    }
    const auto position = current->find(request.name, request.text, *numbers);
    if (!position) {
      return nullptr;
    }
    composed.insert(*position);
    pins->ids.push_back(options.capacity + static_cast<int64_t>(*position));
  }
  pins->rows.assign(rows.begin(), rows.end());
  pins->compositions.assign(composed.begin(), composed.end());
  pins->generation = current;
  pins->state = self;  // from here on nothing may throw: the destructor of `pins` would wait for the mutex
  for (const int64_t number : pins->rows) {
    PoolRow& row = current->rows[static_cast<size_t>(number)];
    ++row.pins;
    row.last_used = ++clock;
  }
  for (const size_t position : pins->compositions) {
    PooledComposition& held = current->compositions[position];
    ++held.pins;
    held.last_used = ++clock;
  }
  return pins;
}

// The caller holds the mutex.
PoolShape PoolState::shape_of(const PoolRequest& request, const std::vector<int64_t>& rows) const {
  PoolShape shape{shape_tree(*request.tree), {}, {}};
  for (const int64_t number : rows) {
    const PoolRow& row = current->rows[static_cast<size_t>(number)];
    TORCH_CHECK(!row.adapter.merged, "AdapterPool: '", request.name, "': '", row.adapter.name,
                "' is merged into the base's weights, where no composition can use it; unmerge it first");
    shape.forms.push_back(row.form);
    shape.parts.push_back(row.adapter.config);
  }
  return shape;
}

// A composition of this shape that nobody holds. Where others hold all of them, one loses its name, and this waits for
// its last lease. nullopt when there is none of this shape that may leave.
std::optional<size_t> PoolState::take_composition(std::unique_lock<std::mutex>& lock, const PoolShape& shape,
                                                  const std::string& name, const std::set<size_t>& kept,
                                                  bool may_wait) {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    std::optional<size_t> best;
    const auto order = [&](size_t i) {
      const PooledComposition& held = current->compositions[i];
      return std::tuple(held.pins > 0, !held.name.empty(), held.last_used);
    };
    for (size_t i = 0; i < current->compositions.size(); ++i) {
      const PooledComposition& held = current->compositions[i];
      if (held.shape == shape && !kept.count(i) && (!best || order(i) < order(*best))) {
        best = i;
      }
    }
    if (!best || (current->compositions[*best].pins > 0 && !may_wait)) {
      return std::nullopt;
    }
    PooledComposition& held = current->compositions[*best];
    held.name.clear();  // no new lease can hold it for ever
    if (held.pins == 0) {
      return best;
    }
    wait_for_leases(lock, start, name);
  }
}

// The shapes of larger banks: the present ones and as many of `shape` again as there are, or, when there are enough,
// the present ones with this shape instead of that of the composition that was used longest ago.
std::vector<PoolShape> PoolState::with_shape(const PoolShape& shape, const PoolRequest& request,
                                             const std::set<size_t>& kept) const {
  std::vector<PoolShape> shapes;
  size_t alike = 0;
  std::optional<size_t> oldest;
  for (size_t i = 0; i < current->compositions.size(); ++i) {
    const PooledComposition& held = current->compositions[i];
    shapes.push_back(held.shape);
    alike += held.shape == shape;
    if (!kept.count(i) && (!oldest || held.last_used < current->compositions[*oldest].last_used)) {
      oldest = i;
    }
  }
  const auto most = static_cast<size_t>(options.max_compositions);
  if (shapes.size() < most) {
    shapes.resize(std::min(most, shapes.size() + std::max<size_t>(alike, 1)), shape);
    return shapes;
  }
  TORCH_CHECK(oldest, "AdapterPool: no room for '", request.name, "': all ", most,
              " compositions are asked for in the same call; raise max_compositions, or ask for fewer at once");
  shapes[*oldest] = shape;
  return shapes;
}

// The positions of those compositions that are in the module. The caller holds the mutex.
std::set<size_t> PoolState::present(const std::vector<PoolRequest>& requests) const {
  std::set<size_t> positions;
  for (const PoolRequest& request : requests) {
    const auto rows = request.tree ? current->rows_of(request.parts) : std::nullopt;
    if (const auto position = rows ? current->find(request.name, request.text, *rows) : std::nullopt) {
      positions.insert(*position);
    }
  }
  return positions;
}

void PoolState::bring(const PoolRequest& request, const std::vector<PoolRequest>& requests) {
  std::unique_lock lock(mutex);
  for (;;) {
    const auto rows = current->rows_of(request.parts);
    if (!rows || current->find(request.name, request.text, *rows)) {
      return;  // an adapter was evicted meanwhile, or another request has brought it
    }
    const PoolShape shape = shape_of(request, *rows);
    const std::set<size_t> kept = present(requests);
    const bool is_full = static_cast<int64_t>(current->compositions.size()) >= options.max_compositions;
    if (const auto position = take_composition(lock, shape, request.name, kept, /*may_wait=*/is_full)) {
      current->banks.compose(*position, request.name, request.parts, *rows);
      PooledComposition& held = current->compositions[*position];
      held = {held.shape, request.name, request.text, *rows, 0, ++clock};
      return;
    }
    const std::vector<PoolShape> shapes = with_shape(shape, request, kept);
    lock.unlock();
    try {
      rebuild(current->banks.room(), shapes);
    } catch (const c10::Error&) {
      explain(request, shape);
      throw;
    }
    lock.lock();
  }
}

// Throws the error of a composition that cannot be had, with the names of its adapters.
void PoolState::explain(const PoolRequest& request, const PoolShape& shape) const {
  Draft draft = open_draft(base.module, base.options);
  for (size_t i = 0; i < shape.parts.size(); ++i) {
    draft.adapters.push_back(
        make_adapter({request.parts[i], shape.parts[i], std::nullopt, ""}, draft.sites.structure, draft.weights));
  }
  draft.compositions = {{request.name, *request.tree}};
  build(std::move(draft), /*active=*/"");
}

}  // namespace torchgraft
