#pragma once

#include <torchgraft/patch/adapter_pool.h>
#include <torchgraft/patch/pool/pool_generation.h>

#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace torchgraft {

// A name that acquire() got: an adapter, or a composition.
struct PoolRequest {
  std::string name;                      // of a composition that stands in the request itself: its text
  std::optional<Composition> tree = {};  // of a composition
  std::string text = {};                 // likewise
  std::vector<std::string> parts = {};   // the adapters that it needs
};

// Throws c10::Error for a name that is the text of a composition: acquire() would run that composition.
void check_pool_name(const std::string& name);

struct PoolState;

// The rows and compositions that a lease holds.
struct PoolPins {
  std::shared_ptr<PoolState> state;
  std::shared_ptr<PoolGeneration> generation;
  std::vector<int64_t> rows;                       // each once
  std::vector<size_t> compositions;                // each once
  std::vector<std::shared_ptr<const Head>> heads;  // one for each name
  std::vector<int64_t> ids;                        // likewise
  std::vector<bool> splits;                        // likewise: whether it splits its inputs

  PoolPins() = default;
  PoolPins(const PoolPins&) = delete;
  PoolPins& operator=(const PoolPins&) = delete;
  // Removes the pins, where `state` is set.
  ~PoolPins();
};

// What an AdapterPool knows. docs/architecture.md has the rules for threads.
struct PoolState {
  using Names = std::set<std::string>;

  PoolState(const torch::jit::Module& module, AdapterPoolOptions options, AdapterPool::Loader loader);

  Adapter prepare(const AdapterSpec& spec) const;
  // Throws c10::Error for a composition that this pool cannot hold.
  void check_composition(const Composition& tree, const std::string& name) const;
  std::vector<PoolRequest> requests(const std::vector<std::string>& names) const;
  // Null when something is not in memory.
  std::unique_ptr<PoolPins> pin(const std::shared_ptr<PoolState>& self, const std::vector<PoolRequest>& requests);

  // The caller of these holds `loading`.
  void load(const Adapter& adapter, const Names& wanted, bool permanent);
  // Makes room for a composition whose adapters are in memory. Those of the other `requests` keep theirs.
  void bring(const PoolRequest& request, const std::vector<PoolRequest>& requests);

  const AdapterPoolOptions options;
  const AdapterPool::Loader loader;
  // The base, for planning adapters and building banks; nothing is grafted onto it.
  Draft base;

  std::mutex loading;  // taken before `mutex`: one thread at a time fetches adapters and writes rows

  mutable std::mutex mutex;  // guards what follows, and the rows and the index of every generation
  std::condition_variable row_freed;
  std::shared_ptr<PoolGeneration> current;
  std::map<std::string, Composition> compositions;  // by name, of AdapterPool::compose
  uint64_t clock = 0;
  AdapterPoolStats counts;

 private:
  void rebuild(std::vector<AdapterConfig> room, const std::vector<PoolShape>& shapes);
  void wait_for_leases(std::unique_lock<std::mutex>& lock, std::chrono::steady_clock::time_point start,
                       const std::string& name);
  int64_t take_row(const std::string& name, const Names& wanted);
  void free_row(int64_t number);
  PoolShape shape_of(const PoolRequest& request, const std::vector<int64_t>& rows) const;
  std::optional<size_t> take_composition(std::unique_lock<std::mutex>& lock, const PoolShape& shape,
                                         const std::string& name, const std::set<size_t>& kept, bool may_wait);
  std::vector<PoolShape> with_shape(const PoolShape& shape, const PoolRequest& request,
                                    const std::set<size_t>& kept) const;
  std::set<size_t> present(const std::vector<PoolRequest>& requests) const;
  void explain(const PoolRequest& request, const PoolShape& shape) const;
};

}  // namespace torchgraft
