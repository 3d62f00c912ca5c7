#pragma once

#include <torchgraft/patch/adapters/adapter.h>
#include <torchgraft/patch/pool/pool_banks.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace torchgraft {

// Who may touch the tensors of a row follows from `use` and `pins`, which AdapterPool::State::mutex guards:
//   kFree     nobody
//   kWriting  the one thread that holds AdapterPool::State::loading
//   kReady    its name leads to it; whoever holds a pin reads it
//   kLeaving  no name leads to it; whoever holds a pin reads it, and the last one to go frees it
struct PoolRow {
  enum class Use { kFree, kWriting, kReady, kLeaving };
  Use use = Use::kFree;
  Adapter adapter = {};  // without weights: those are in the banks
  int64_t pins = 0;
  uint64_t last_used = 0;
  bool permanent = false;  // came with the module
  std::shared_ptr<const Head> head = nullptr;
};

// One set of banks. When an adapter does not fit, the pool builds the next generation; leases keep the one that they
// began with.
struct PoolGeneration {
  PoolGeneration(Draft draft, std::vector<AdapterConfig> room, int64_t capacity, int64_t max_row_bytes)
      : banks(std::move(draft), std::move(room), capacity, max_row_bytes), rows(static_cast<size_t>(capacity)) {}

  PoolBanks banks;
  std::vector<PoolRow> rows;
  std::map<std::string, int64_t> index;  // name -> row, of rows that are ready

  // Frees a row that no name leads to: at once, or when its last lease ends.
  void release(int64_t number) {
    PoolRow& row = rows[static_cast<size_t>(number)];
    row.use = row.pins > 0 ? PoolRow::Use::kLeaving : PoolRow::Use::kFree;
  }

  // Takes a row's name away and frees the row.
  void evict(int64_t number) {
    index.erase(rows[static_cast<size_t>(number)].adapter.name);
    release(number);
  }
};

}  // namespace torchgraft
