#pragma once

#include <torchgraft/config/head_config.h>
#include <torchgraft/patch/graft.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// How large a pool is, and how it grafts.
struct AdapterPoolOptions {
  int64_t capacity = 64;  // adapters in memory at once
  // Configurations that each row can hold from the start. For an adapter that needs more (another site, a larger rank,
  // a longer prefix) the pool builds larger banks beside its traffic and moves over to them. Empty: the configuration
  // of the first adapter.
  std::vector<AdapterConfig> room = {};
  // The most bytes that a row may have; all `capacity` rows grow together. The pool refuses an adapter that needs more.
  // 0: no limit.
  int64_t max_row_bytes = 0;
  // How the base is grafted. With gate_pooling "unpadded" a row's result depends on no other row of its batch; empty,
  // each adapter keeps its own, and one batch may mix both. The pool ignores `active`: no adapter is active.
  GraftOptions graft = {};
};

// What a pool holds now, and what it has done so far.
struct AdapterPoolStats {
  int64_t capacity = 0;
  int64_t resident = 0;
  int64_t row_bytes = 0;   // of one row in all banks, padding included
  int64_t bank_bytes = 0;  // of all rows
  int64_t loads = 0;       // rows written
  int64_t evictions = 0;   // adapters that left for others, not those replaced by insert()
  int64_t rebuilds = 0;    // banks that had to grow
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

    // The row of each name that was asked for, in that order; -1 for the base.
    const std::vector<int64_t>& ids() const { return ids_; }

    // The task head of the adapter whose name was asked for at `position`; null when the adapter has none. Heads are
    // not in the module.
    const HeadConfig* head(size_t position) const;

    // The logits [B, L], for tagging [B, S, L], that this head computes from hidden states [B, S, H] of the adapter's
    // rows, as forward_with_head does. token_mask [B, S] is non-zero where a token is real. Throws c10::Error when the
    // adapter has no head.
    at::Tensor logits(size_t position, const at::Tensor& hidden, const at::Tensor& token_mask) const;

   private:
    friend class AdapterPool;
    struct Held;
    Lease(std::unique_ptr<Held> held, std::vector<int64_t> ids);
    std::unique_ptr<Held> held_;
    std::vector<int64_t> ids_;
  };

  // Fetches an adapter that is not in memory: returns a spec of that name, with weights, or throws. The pool calls it
  // from one thread at a time.
  using Loader = std::function<AdapterSpec(const std::string& name)>;

  // `module` is a base or a grafted module. It stays as it is; the pool shares the memory of the base's weights.
  // Adapters of a grafted module keep their rows for good, because the loader could not bring them back. `loader` may
  // be null: then only insert() brings adapters in. Throws c10::Error as graft() does, and unless the capacity is above
  // the number of adapters of `module`.
  AdapterPool(const torch::jit::Module& module, AdapterPoolOptions options, Loader loader = nullptr);

  AdapterPool(const AdapterPool&) = delete;
  AdapterPool& operator=(const AdapterPool&) = delete;
  ~AdapterPool();

  // Returns a lease on the adapters of these names. An empty name is the base, and a name may come several times. Loads
  // adapters that are not in memory, and waits for rows that others hold. Throws c10::Error when the loader does not
  // know a name, when an adapter does not fit, and when there are more names than rows; the pool stays usable.
  Lease acquire(const std::vector<std::string>& names);

  // Does the same without waiting or loading; nullopt when one of the adapters is not in memory.
  std::optional<Lease> try_acquire(const std::vector<std::string>& names);

  // Brings an adapter in, or replaces the one of that name for all who acquire from now on; leases keep what they have.
  // Throws c10::Error, and changes nothing, when the adapter does not fit the model or max_row_bytes. When memory runs
  // out while the row is written, another adapter may have left already.
  void insert(const AdapterSpec& spec);

  // Takes an adapter out of memory; leases keep it until they end. Returns false when the adapter is not in memory.
  // Throws c10::Error for an adapter that came with the module.
  bool evict(const std::string& name);

  std::vector<std::string> resident() const;  // sorted
  AdapterPoolStats stats() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace torchgraft
