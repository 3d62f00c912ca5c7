#pragma once

#include <torchgraft/patch/module/adapter_bank.h>
#include <torchgraft/patch/module/draft.h>

#include <string>
#include <vector>

namespace torchgraft {

// A grafted module whose banks have a fixed number of rows, [capacity, ...], that are rewritten in place. What a row
// may hold is settled by the configurations that the banks were made for: their slots, largest ranks, prefix lengths
// and gates. Knows nothing of threads: who writes a row sees to it that nobody runs it (AdapterPool).
class PoolBanks {
 public:
  // Consumes a draft; its adapters are ignored. No row holds an adapter yet. Throws c10::Error when a row for
  // `room` takes more than max_row_bytes; 0 is no limit.
  PoolBanks(Draft draft, std::vector<AdapterConfig> room, int64_t capacity, int64_t max_row_bytes = 0);

  const torch::jit::Module& module() const { return module_; }
  const std::vector<AdapterConfig>& room() const { return room_; }

  // Empty when a row can hold `adapter`, else what it lacks: "no bank for selfattn_lora_k of layer 0".
  std::string misfit(const Adapter& adapter) const;

  // Makes `row` this adapter's, name and gates included. Not for an adapter that does not fit.
  void write(int64_t row, const Adapter& adapter);

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
  void collect_slots(int64_t capacity);
  static void write_slot(const Slot& slot, int64_t row, const ModuleWeights* weights);

  torch::jit::Module module_;
  std::vector<AdapterConfig> room_;
  std::vector<Slot> slots_;
};

}  // namespace torchgraft
