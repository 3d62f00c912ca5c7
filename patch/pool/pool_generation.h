#pragma once

#include <torchgraft/patch/adapters/adapter.h>
#include <torchgraft/patch/pool/pool_banks.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
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
  std::string form = {};   // form_of
  std::shared_ptr<const Head> head = nullptr;
};

// A composition of a fixed shape, whose id is the number of rows plus its position. As with a row, it is changed only
// while it has no pins, by the thread that holds AdapterPool::State::loading.
struct PooledComposition {
  PoolShape shape;
  std::string name = {};  // empty: it is no composition now, and no new lease can have it
  std::string text = {};
  std::vector<int64_t> rows = {};  // of its adapters, in the order of adapters_in
  int64_t pins = 0;
  uint64_t last_used = 0;
};

// One set of banks. When an adapter does not fit, the pool builds the next generation; leases keep the one that they
// began with.
struct PoolGeneration {
  PoolGeneration(Draft draft, std::vector<AdapterConfig> room, const std::vector<PoolShape>& shapes, int64_t capacity,
                 int64_t max_row_bytes)
      : banks(std::move(draft), std::move(room), shapes, capacity, max_row_bytes), rows(static_cast<size_t>(capacity)) {
    for (const PoolShape& shape : shapes) {
      compositions.push_back({shape});
    }
  }

  PoolBanks banks;
  std::vector<PoolRow> rows;
  std::vector<PooledComposition> compositions;
  std::map<std::string, int64_t> index;  // name -> row, of rows that are ready

  // The rows of these adapters, in their order; nullopt when one is not there.
  std::optional<std::vector<int64_t>> rows_of(const std::vector<std::string>& names) const {
    std::vector<int64_t> numbers;
    for (const std::string& name : names) {
      const auto found = index.find(name);
      if (found == index.end()) {
        return std::nullopt;
      }
      numbers.push_back(found->second);
    }
    return numbers;
  }

  // The position of that composition of adapters in these rows. A row may have another adapter than it had.
  std::optional<size_t> find(const std::string& name, const std::string& text,
                             const std::vector<int64_t>& numbers) const {
    for (size_t i = 0; i < compositions.size(); ++i) {
      const PooledComposition& held = compositions[i];
      bool is_same = held.name == name && held.text == text && held.rows == numbers;
      for (size_t part = 0; is_same && part < numbers.size(); ++part) {
        is_same = rows[static_cast<size_t>(numbers[part])].form == held.shape.forms[part];
      }
      if (is_same) {
        return i;
      }
    }
    return std::nullopt;
  }

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
