#pragma once

#include <torchgraft/config/composition_string.h>
#include <torchgraft/config/head_config.h>
#include <torchgraft/patch/graft.h>

#include <c10/util/Exception.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

struct PoolPins;
struct PoolRequest;
struct PoolState;

// How large a pool is, and how it grafts.
struct AdapterPoolOptions {
  int64_t capacity = 64;  // adapters in memory at once
  // Configurations that each row can hold from the start. For an adapter that needs more (another site, a larger rank,
  // a longer prefix) the pool builds larger banks beside its traffic and moves over to them. Empty: the configuration
  // of the first adapter.
  std::vector<AdapterConfig> room = {};
  // The banks stay those that `room` and the module's adapters need: an adapter that does not fit is an error, and the
  // pool takes no compositions. For who hands the banks' tensors on: an AOTInductor package that reads them, for
  // example.
  bool fixed_banks = false;
  // The most bytes that a row may have; all `capacity` rows grow together. The pool refuses an adapter that needs more.
  // 0: no limit.
  int64_t max_row_bytes = 0;
  // Compositions that the module holds at once; each costs a branch at every place where its adapters act. For one of
  // another structure (other blocks, weights or sizes, or adapters of other kinds) the pool builds its module anew
  // beside its traffic. 0: the pool takes no compositions.
  int64_t max_compositions = 16;
  int64_t max_composition_parts = 8;  // adapters in a composition
  int64_t max_composition_depth = 3;  // blocks one in another
  // The longest that acquire() and insert() wait for a row or a composition that others hold. nullopt: no limit.
  std::optional<std::chrono::milliseconds> longest_wait = {};
  // How the base is grafted. With gate_pooling "unpadded" a row's result depends on no other row of its batch; empty,
  // each adapter keeps its own, and one batch may mix both. The pool ignores `active`: no adapter is active.
  GraftOptions graft = {};
};

// What a pool holds now, and what it has done so far.
struct AdapterPoolStats {
  int64_t capacity = 0;
  int64_t resident = 0;
  int64_t row_bytes = 0;     // of one row in all banks, padding included
  int64_t bank_bytes = 0;    // of all rows
  int64_t loads = 0;         // rows written
  int64_t evictions = 0;     // adapters that left for others, not those replaced by insert()
  int64_t rebuilds = 0;      // modules built anew: banks that had to grow, and compositions of another structure
  int64_t compositions = 0;  // that the module holds now
};

// Others have held all rows for AdapterPoolOptions::longest_wait.
class TORCHGRAFT_PATCH_API RowsInUse : public c10::Error {
 public:
  using c10::Error::Error;
};

// Any number of adapters on one base. `capacity` of them are in memory, as rows of banks [capacity, ...]. To load an
// adapter the pool writes a row in place; the graph and the module stay as they are. When no row is free, the adapter
// that was used longest ago leaves.
//
// Threads: any thread may call any function. The pool writes a row only while nobody holds a lease on it, so a forward
// pass reads the adapters that it asked for, and no half-written ones. A forward pass waits only for a short lock in
// acquire(); loading waits for rows. A thread that holds a lease while it waits in acquire() may wait for itself:
// acquire all that a batch needs in one call.
class TORCHGRAFT_PATCH_API AdapterPool {
 public:
  // The right to run some rows of `module()`. While a lease lives, its rows keep their adapters. Movable; may outlive
  // the pool.
  class TORCHGRAFT_PATCH_API Lease {
   public:
    Lease(Lease&&) noexcept;
    Lease& operator=(Lease&&) noexcept;
    ~Lease();

    // Run its forward, forward_with_gates or grafted_forward with adapter_ids made of ids(). Call none of its other
    // methods (activate, adapter_names, ...) while the pool may change rows. One forward pass can serve two leases that
    // have the same module: same_module().
    const torch::jit::Module& module() const;
    bool same_module(const Lease& other) const;

    // The row of each name that was asked for, in that order; -1 for the base. Ids of compositions follow those of the
    // rows.
    const std::vector<int64_t>& ids() const;

    // The task head of the adapter whose name was asked for at `position`, of a composition the head of the adapter
    // that ends a Stack; null when there is none. Heads are not in the module.
    const HeadConfig* head(size_t position) const;

    // The logits [B, L], for tagging [B, S, L], that this head computes from hidden states [B, S, H] of the adapter's
    // rows, as forward_with_head does. token_mask [B, S] is non-zero where a token is real. Throws c10::Error when the
    // adapter has no head.
    at::Tensor logits(size_t position, const at::Tensor& hidden, const at::Tensor& token_mask) const;

    // Whether the name at `position` is a composition with a Split or a BatchSplit, whose rows a batch must have alone.
    bool splits_inputs(size_t position) const;

   private:
    friend class AdapterPool;
    explicit Lease(std::unique_ptr<PoolPins> held);
    std::unique_ptr<PoolPins> held_;
  };

  // Fetches an adapter that is not in memory: returns a spec of that name, with weights, or throws. The pool calls it
  // from one thread at a time.
  using Loader = std::function<AdapterSpec(const std::string& name)>;

  // `module` is a base or a grafted module. It stays as it is; the pool shares the memory of the base's weights.
  // Adapters of a grafted module keep their rows for good, because the loader could not bring them back; its
  // compositions keep their names, as if compose() had got them. `loader` may
  // be null: then only insert() brings adapters in. Throws c10::Error as graft() does, and unless the capacity is above
  // the number of adapters of `module`.
  AdapterPool(const torch::jit::Module& module, AdapterPoolOptions options, Loader loader = nullptr);

  AdapterPool(const AdapterPool&) = delete;
  AdapterPool& operator=(const AdapterPool&) = delete;
  ~AdapterPool();

  // Returns a lease on the adapters of these names. An empty name is the base, and a name may come several times. A
  // name may also be that of a composition (compose()), or the text of one: "Stack(en, ner)". Its adapters are loaded
  // and evicted as others are. Loads adapters that are not in memory, and waits for rows that others hold. Throws
  // c10::Error when the loader does not know a name, when an adapter does not fit, when a composition is refused, when
  // there are more names than rows, and RowsInUse after `longest_wait`; the pool stays usable. The adapter whose row it
  // waited for has left then, as soon as its leases end.
  Lease acquire(const std::vector<std::string>& names);

  // Does the same without waiting or loading; nullopt when an adapter or a composition is not in memory.
  std::optional<Lease> try_acquire(const std::vector<std::string>& names);

  // Brings an adapter in, or replaces the one of that name for all who acquire from now on; leases keep what they have.
  // Throws c10::Error, and changes nothing, when the adapter does not fit the model or max_row_bytes. When memory runs
  // out while the row is written, another adapter may have left already.
  void insert(const AdapterSpec& spec);

  // Takes an adapter out of memory; leases keep it until they end. Returns false when the adapter is not in memory.
  // Throws c10::Error for an adapter that came with the module.
  bool evict(const std::string& name);

  // Gives a composition a name, or the name another composition, for all who acquire from now on. Its adapters need not
  // be in memory. Throws c10::Error for one with a Fuse, a Parallel or a MultiTask, beyond the limits of the options,
  // and for the name of an adapter in memory.
  void compose(const std::string& name, const Composition& tree);
  bool remove_composition(const std::string& name);         // false when there is none
  std::map<std::string, std::string> compositions() const;  // name -> text

  std::vector<std::string> resident() const;  // sorted

  // The configurations that each row can hold now, with or without gates and sizes of their own. A pool on the same
  // base with this room has banks of the same names and sizes.
  std::vector<AdapterConfig> room() const;

  // Why an adapter of this configuration does not fit into the banks as they are ("no bank for
  // layer_0.selfattn_lora_k"); empty: it fits. Throws c10::Error when it does not fit the model.
  std::string misfit(const AdapterConfig& config) const;

  AdapterPoolStats stats() const;

 private:
  std::optional<Lease> lease(const std::vector<PoolRequest>& requests);
  std::shared_ptr<PoolState> state_;
};

}  // namespace torchgraft
