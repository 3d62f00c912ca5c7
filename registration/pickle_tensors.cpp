#include <torchgraft/registration/pickle_tensors.h>

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace torchgraft {
namespace {

// What matters of a pickled value.
struct PickledValue {
  enum class Kind { kOther, kNumber, kText, kGlobal, kTuple, kStorage };

  Kind kind = Kind::kOther;
  int64_t number = 0;     // of a storage: its bytes
  std::string text = {};  // of a global: module and name; of a storage: its key
  uint64_t element_bytes = 0;
  std::shared_ptr<const std::vector<PickledValue>> items = {};
  int depth = 0;  // of a tuple
};
using PickledKind = PickledValue::Kind;

constexpr int kDeepestTuple = 3;  // a tensor's arguments hold its sizes

uint64_t bytes_of_element(const std::string& global) {
#define TORCHGRAFT_STORAGE(type, name)      \
  if (global == "torch " #name "Storage") { \
    return sizeof(type);                    \
  }
  AT_FORALL_SCALAR_TYPES_WITH_COMPLEX_AND_QINTS(TORCHGRAFT_STORAGE)
#undef TORCHGRAFT_STORAGE
  TORCH_CHECK(false, "its tensors are of a type that is not known, ", global);
}

class PickleWalk {
 public:
  PickleWalk(std::string_view bytes, const std::function<uint64_t(const std::string&)>& record_bytes)
      : bytes_(bytes), record_bytes_(record_bytes) {}

  void run() {
    while (step(take<unsigned char>())) {
    }
  }

 private:
  std::string_view take_bytes(size_t count) {
    TORCH_CHECK(count <= bytes_.size() - place_, "its pickle ends early");
    place_ += count;
    return bytes_.substr(place_ - count, count);
  }

  template <typename Number>
  Number take() {
    Number number;
    std::memcpy(&number, take_bytes(sizeof(Number)).data(), sizeof(Number));
    return number;
  }

  std::string take_line() {
    const size_t end = bytes_.find('\n', place_);
    TORCH_CHECK(end != std::string_view::npos, "its pickle ends early");
    const std::string line(take_bytes(end - place_));
    ++place_;
    return line;
  }

  void push(PickledValue value = {}) { stack_.push_back(std::move(value)); }
  void push_number(int64_t number) { push({.kind = PickledKind::kNumber, .number = number}); }
  void push_text(size_t length) { push({.kind = PickledKind::kText, .text = std::string(take_bytes(length))}); }
  void push_global(const std::string& module, const std::string& name) {
    push({.kind = PickledKind::kGlobal, .text = module + " " + name});
  }

  PickledValue pop() {
    TORCH_CHECK(!stack_.empty(), "its pickle is damaged");
    PickledValue value = std::move(stack_.back());
    stack_.pop_back();
    return value;
  }

  // What is above the last mark, without it.
  std::vector<PickledValue> pop_to_mark() {
    TORCH_CHECK(!marks_.empty() && marks_.back() <= stack_.size(), "its pickle is damaged");
    const auto first = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<PickledValue> values(std::make_move_iterator(first), std::make_move_iterator(stack_.end()));
    stack_.erase(first, stack_.end());
    marks_.pop_back();
    return values;
  }

  std::vector<PickledValue> pop_many(size_t count) {
    std::vector<PickledValue> values(count);
    std::generate(values.rbegin(), values.rend(), [&] { return pop(); });
    return values;
  }

  void push_tuple(std::vector<PickledValue> items) {
    int depth = 0;
    for (const PickledValue& item : items) {
      depth = std::max(depth, item.depth);
    }
    if (depth >= kDeepestTuple) {
      return push();
    }
    push({.kind = PickledKind::kTuple,
          .items = std::make_shared<const std::vector<PickledValue>>(std::move(items)),
          .depth = depth + 1});
  }

  void remember(uint32_t number) {
    TORCH_CHECK(!stack_.empty(), "its pickle is damaged");
    memo_[number] = stack_.back();
  }
  void recall(uint32_t number) {
    const auto found = memo_.find(number);
    TORCH_CHECK(found != memo_.end(), "its pickle is damaged");
    push(found->second);
  }

  void push_long(size_t length) {
    TORCH_CHECK(length <= sizeof(int64_t), "its pickle has a number beyond 64 bits");
    const std::string_view digits = take_bytes(length);
    uint64_t number = length > 0 && (digits.back() & 0x80) ? ~uint64_t{0} : 0;
    for (size_t i = length; i-- > 0;) {
      number = number << 8 | static_cast<unsigned char>(digits[i]);
    }
    push_number(static_cast<int64_t>(number));
  }

  // ("storage", type, key, device, elements)
  void push_storage() {
    const PickledValue id = pop();
    TORCH_CHECK(id.kind == PickledKind::kTuple && id.items->size() >= 5,
                "its pickle names a tensor's data in an unknown way");
    const std::vector<PickledValue>& items = *id.items;
    TORCH_CHECK(items[1].kind == PickledKind::kGlobal && items[2].kind == PickledKind::kText &&
                    items[4].kind == PickledKind::kNumber && items[4].number >= 0,
                "its pickle names a tensor's data in an unknown way");
    const std::string& key = items[2].text;
    const uint64_t element = bytes_of_element(items[1].text);
    uint64_t bytes = 0;
    const bool overflow = __builtin_mul_overflow(static_cast<uint64_t>(items[4].number), element, &bytes);
    if (bytes > 0 || overflow) {
      const uint64_t held = record_bytes_(key);
      TORCH_CHECK(!overflow && bytes <= held, "its record ", key, " has ", held, " bytes, expected ",
                  overflow ? "more than there can be" : std::to_string(bytes));
    }
    push({.kind = PickledKind::kStorage, .number = static_cast<int64_t>(bytes), .text = key, .element_bytes = element});
  }

  static std::optional<std::vector<int64_t>> numbers_of(const PickledValue& value) {
    std::vector<int64_t> numbers;
    if (value.kind != PickledKind::kTuple) {
      return std::nullopt;
    }
    for (const PickledValue& item : *value.items) {
      if (item.kind != PickledKind::kNumber || item.number < 0) {
        return std::nullopt;
      }
      numbers.push_back(item.number);
    }
    return numbers;
  }

  // A call of `function`: those that make tensors have arguments (storage, offset, sizes, strides, ...).
  void push_result(const PickledValue& function, const PickledValue& arguments) {
    const bool makes_tensor =
        function.kind == PickledKind::kGlobal &&
        (function.text == "torch._utils _rebuild_tensor_v2" || function.text == "torch._utils _rebuild_qtensor");
    if (makes_tensor) {
      TORCH_CHECK(arguments.kind == PickledKind::kTuple && arguments.items->size() >= 4,
                  "its pickle has an odd tensor");
      const std::vector<PickledValue>& items = *arguments.items;
      const auto sizes = numbers_of(items[2]);
      const auto strides = numbers_of(items[3]);
      TORCH_CHECK(items[0].kind == PickledKind::kStorage && items[1].kind == PickledKind::kNumber &&
                      items[1].number >= 0 && sizes && strides && sizes->size() == strides->size(),
                  "its pickle has an odd tensor");
      check_tensor(items[0], items[1].number, *sizes, *strides);
    }
    push();
  }

  static void check_tensor(const PickledValue& storage, int64_t offset, const std::vector<int64_t>& sizes,
                           const std::vector<int64_t>& strides) {
    if (std::count(sizes.begin(), sizes.end(), 0) > 0) {
      return;
    }
    bool overflow = false;
    auto last = static_cast<uint64_t>(offset);  // the place of its last element
    for (size_t i = 0; i < sizes.size(); ++i) {
      uint64_t step = 0;
      overflow |= __builtin_mul_overflow(static_cast<uint64_t>(sizes[i] - 1), static_cast<uint64_t>(strides[i]), &step);
      overflow |= __builtin_add_overflow(last, step, &last);
    }
    const uint64_t elements = static_cast<uint64_t>(storage.number) / storage.element_bytes;
    TORCH_CHECK(!overflow && last < elements, "its record ", storage.text, " holds ", elements,
                " elements, which is less than a tensor's shape needs");
  }

  // Returns false at the end of the pickle.
  bool step(unsigned char operation) {
    switch (operation) {
      case '.':
        return false;
      case 0x80:  // protocol
        take<uint8_t>();
        return true;
      case '(':
        marks_.push_back(stack_.size());
        return true;
      case 'q':
        remember(take<uint8_t>());
        return true;
      case 'r':
        remember(take<uint32_t>());
        return true;
      default:
        return push_constant(operation) || combine(operation) || refuse(operation);
    }
  }

  bool push_constant(unsigned char operation) {
    switch (operation) {
      case 'h':
        recall(take<uint8_t>());
        return true;
      case 'j':
        recall(take<uint32_t>());
        return true;
      case 'K':
        push_number(take<uint8_t>());
        return true;
      case 'M':
        push_number(take<uint16_t>());
        return true;
      case 'J':
        push_number(take<int32_t>());
        return true;
      case 0x8a:
        push_long(take<uint8_t>());
        return true;
      case 'T':
      case 'X':
        push_text(take<uint32_t>());
        return true;
      case 0x8c:
        push_text(take<uint8_t>());
        return true;
      case 'G':
        take_bytes(sizeof(double));
        push();
        return true;
      case 'N':
      case 0x88:  // true
      case 0x89:  // false
      case ']':
      case '}':
        push();
        return true;
      case ')':
        push_tuple({});
        return true;
      case 'c': {
        const std::string module = take_line();
        push_global(module, take_line());
        return true;
      }
      default:
        return false;
    }
  }

  // Operations on what is on the stack.
  bool combine(unsigned char operation) {
    switch (operation) {
      case 't':
        push_tuple(pop_to_mark());
        return true;
      case 0x85:
      case 0x86:
      case 0x87:
        push_tuple(pop_many(operation - 0x84u));
        return true;
      case 'l':
      case 'd':
        pop_to_mark();
        push();
        return true;
      case 'e':
      case 'u':
        pop_to_mark();
        return true;
      case 'a':
        pop();
        return true;
      case 's':
        pop_many(2);
        return true;
      case 'b':
        pop();
        return true;
      case 0x81: {
        pop_many(2);
        push();
        return true;
      }
      case 0x93: {
        const std::vector<PickledValue> names = pop_many(2);
        push_global(names[0].text, names[1].text);
        return true;
      }
      case 'R': {
        const PickledValue arguments = pop();
        push_result(pop(), arguments);
        return true;
      }
      case 'Q':
        push_storage();
        return true;
      default:
        return false;
    }
  }

  static bool refuse(unsigned char operation) {
    TORCH_CHECK(false, "its pickle has the operation ", static_cast<int>(operation),
                ", which TorchScript files do not use");
  }

  std::string_view bytes_;
  const std::function<uint64_t(const std::string&)>& record_bytes_;
  size_t place_ = 0;
  std::vector<PickledValue> stack_;
  std::vector<size_t> marks_;
  std::map<uint32_t, PickledValue> memo_;
};

}  // namespace

void check_pickled_tensors(std::string_view pickle,
                           const std::function<uint64_t(const std::string& key)>& record_bytes) {
  PickleWalk(pickle, record_bytes).run();
}

}  // namespace torchgraft
