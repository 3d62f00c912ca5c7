#pragma once

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/pool/pool_shape.h>

#include <string>
#include <vector>

namespace torchgraft {

// A grafted module whose banks have a fixed number of rows, [capacity, ...], which are rewritten in place. The
// configurations in `room` decide what a row can hold: slots, largest ranks, prefix lengths and gates. Behind the rows
// come compositions of these shapes, whose adapters are rows. Knows nothing of threads: whoever writes a row or a
// composition makes sure that nobody runs it (AdapterPool does).
class PoolBanks {
 public:
  // Builds the module from `draft`, whose adapters are ignored. No row holds an adapter yet. Throws c10::Error when a
  // row for `room` takes more than max_row_bytes (0 is no limit), or when a composition cannot be had.
  PoolBanks(Draft draft, std::vector<AdapterConfig> room, const std::vector<PoolShape>& shapes, int64_t capacity,
            int64_t max_row_bytes = 0);

  const torch::jit::Module& module() const { return module_; }
  const std::vector<AdapterConfig>& room() const { return room_; }

  // What a row lacks for holding `adapter` ("no bank for layer_0.selfattn_lora_k"); empty when it lacks nothing.
  std::string misfit(const Adapter& adapter) const;

  // Writes the adapter's weights, name, configuration and gate counts into `row`. The adapter must fit.
  void write(int64_t row, const Adapter& adapter);

  // Makes the composition of shape number `shape` one of the adapters in these rows. Its gates go by `name` and by
  // `parts`, the adapters' names.
  void compose(size_t shape, const std::string& name, const std::vector<std::string>& parts,
               const std::vector<int64_t>& rows);

  // The weights of the adapter in `row`, in the order of its plan.
  AdapterWeights read(int64_t row, const Plan& plan) const;

  // Bytes that one row takes in all banks, padding included.
  int64_t row_bytes() const;

 private:
  struct Slot {
    std::string path;  // "layer_0.selfattn_lora_q"
    std::map<std::string, at::Tensor> parameters;
  };

  void check_row_bytes(int64_t limit) const;
  void allocate_banks(int64_t capacity);
  void number_compositions(int64_t capacity);
  static void write_slot(const Slot& slot, int64_t row, const ModuleWeights* weights, const PlannedModule* module);

  torch::jit::Module module_;
  std::vector<AdapterConfig> room_;
  GatePoolings poolings_;
  std::vector<Slot> slots_;
};

}  // namespace torchgraft
