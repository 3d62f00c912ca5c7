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

struct AdapterPoolOptions {
  int64_t capacity = 64;  // adapters in memory at once
  // Configurations that the rows of the banks are made for. An adapter that needs more (a place, a rank, a longer
  // prefix) is not refused: the pool builds larger banks beside its traffic and moves over. Empty: that of the first
  // adapter.
  std::vector<AdapterConfig> room = {};
  // The most bytes that a row may grow to; all `capacity` rows grow together. An adapter that needs more is refused.
  // 0: no limit.
  int64_t max_row_bytes = 0;
  // How the base is grafted. With gate_pooling "unpadded" a row's result depends on nothing else in its batch.
  // `active` and `verify` are as in graft(); none is active.
  GraftOptions graft = {};
};

struct AdapterPoolStats {
  int64_t capacity = 0;
  int64_t resident = 0;
  int64_t row_bytes = 0;   // of one adapter in the banks, padding included
  int64_t bank_bytes = 0;  // of all rows
  int64_t loads = 0;       // rows written
  int64_t evictions = 0;   // adapters that left for others, not those replaced by insert()
  int64_t rebuilds = 0;    // banks that had to grow
};

// Any number of adapters on one base model, of which `capacity` are in memory: rows of stacked banks [capacity, ...].
// An adapter comes in by having its row written, in place, with the graph and the module as they are; when the rows are
// full the one that was used longest ago leaves.
//
// Threads: every function may be called from any thread. A row is written only while nobody holds a lease on it, so a
// forward pass reads whole adapters, and those that it asked for. Forward passes wait for nothing but the short lock in
// acquire(); loading waits for rows. Leases that a thread holds while it waits in acquire() can make it wait for
// itself: acquire all that a batch needs in one call.
class TORCHGRAFT_PATCH_API AdapterPool {
 public:
  // The right to run rows of `module()`; while it lives, they hold what they held when it was made. Movable. It may
  // outlive the pool.
  class TORCHGRAFT_PATCH_API Lease {
   public:
    Lease(Lease&&) noexcept;
    Lease& operator=(Lease&&) noexcept;
    ~Lease();

    // Run forward, forward_with_gates or grafted_forward with adapter_ids made of ids(). Its other methods (activate,
    // adapter_names, ...) are not for use while the pool changes rows. Two leases can be served by one forward pass
    // when their modules are the same object: same_module().
    const torch::jit::Module& module() const;
    bool same_module(const Lease& other) const;

    // One row for each name that was asked for, in that order; -1 for the base model.
    const std::vector<int64_t>& ids() const { return ids_; }

    // The task head of the adapter asked for at `position`; null when it has none. Heads are not in the module.
    const HeadConfig* head(size_t position) const;

    // What it makes of the hidden states [B, S, H] of rows of that adapter; token_mask [B, S], non-zero where a token
    // is real: logits [B, L], for tagging [B, S, L], as forward_with_head gives them. Throws c10::Error when it has no
    // head.
    at::Tensor logits(size_t position, const at::Tensor& hidden, const at::Tensor& token_mask) const;

   private:
    friend class AdapterPool;
    struct Held;
    Lease(std::unique_ptr<Held> held, std::vector<int64_t> ids);
    std::unique_ptr<Held> held_;
    std::vector<int64_t> ids_;
  };

  // Fetches an adapter that is asked for and not in memory: returns a spec of that name, with weights, or throws.
  // Called by one thread at a time.
  using Loader = std::function<AdapterSpec(const std::string& name)>;

  // `module`: a base, or a grafted module, whose adapters then hold rows for good: there is nowhere to get them back
  // from. It is not changed; base weights share its memory. `loader` may be null: only insert() brings adapters in.
  // Throws c10::Error as graft() does, and when capacity is not above the number of adapters of `module`.
  AdapterPool(const torch::jit::Module& module, AdapterPoolOptions options, Loader loader = nullptr);

  AdapterPool(const AdapterPool&) = delete;
  AdapterPool& operator=(const AdapterPool&) = delete;
  ~AdapterPool();

  // A lease on the adapters of these names; an empty name is the base model, and a name may come several times. Loads
  // what is not in memory, waiting for rows that others hold. Throws c10::Error when a name is unknown to the loader,
  // its files do not fit, or there are more names than rows. What it throws leaves the pool as usable as before.
  Lease acquire(const std::vector<std::string>& names);

  // The same without waiting or loading: nullopt when one of them is not in memory.
  std::optional<Lease> try_acquire(const std::vector<std::string>& names);

  // Brings an adapter in, or replaces the one of that name at once for all who acquire from now on; leases keep what
  // they have. Throws c10::Error when it does not fit the model or max_row_bytes; then nothing has changed. When memory
  // runs out while it is written, another may have left for it.
  void insert(const AdapterSpec& spec);

  // Takes an adapter out of memory; leases keep it until they end. False when it is not in memory. Throws c10::Error
  // for an adapter that came with the module.
  bool evict(const std::string& name);

  std::vector<std::string> resident() const;  // sorted
  AdapterPoolStats stats() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace torchgraft
