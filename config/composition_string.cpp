#include <torchgraft/config/composition_string.h>

#include <torchgraft/config/json_fields.h>
#include <torchgraft/registration/parse_json.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <cctype>
#include <numeric>
#include <utility>

namespace torchgraft {
namespace {

using json::Json;

constexpr int kDeepestText = 8;  // check_composition allows fewer

bool is_plain_character(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '-'; }

// kAdapter: no block is called so.
BlockKind block_kind(std::string_view name) {
  for (const BlockKind kind : {BlockKind::kStack, BlockKind::kFuse, BlockKind::kSplit, BlockKind::kBatchSplit,
                               BlockKind::kParallel, BlockKind::kMultiTask, BlockKind::kAverage}) {
    if (name == to_string(kind)) {
      return kind;
    }
  }
  return BlockKind::kAdapter;
}

// Reads "Stack(en, ner)" from left to right.
class CompositionReader {
 public:
  explicit CompositionReader(std::string_view text) : text_(text) {}

  Composition read() {
    Composition result = block(0);
    skip_spaces();
    check(at_ == text_.size(), "nothing more");
    if (result.kind == BlockKind::kAdapter) {
      Composition stack{BlockKind::kStack};
      stack.children.push_back(std::move(result));
      return stack;
    }
    return result;
  }

 private:
  void check(bool condition, const char* expected) const {
    TORCH_CHECK(condition, "composition: expected ", expected, " at character ", at_ + 1, " of \"",
                text_.substr(0, 200), "\"; write e.g. Stack(en, ner) or Average(a, b, weights=[0.3, 0.7])");
  }

  void skip_spaces() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) {
      ++at_;
    }
  }

  bool take(char c) {
    skip_spaces();
    if (at_ < text_.size() && text_[at_] == c) {
      ++at_;
      return true;
    }
    return false;
  }

  // The text in quotes. Two quotes within it stand for one.
  std::string quoted(char quote) {
    std::string result;
    for (bool is_first = true; is_first || (at_ < text_.size() && text_[at_] == quote); is_first = false) {
      const size_t end = text_.find(quote, at_ + 1);
      check(end != std::string_view::npos, "a quote that ends");
      result += is_first ? "" : std::string(1, quote);
      result += text_.substr(at_ + 1, end - at_ - 1);
      at_ = end + 1;
    }
    check_text(result, "composition");
    return result;
  }

  // A word, or what stands in quotes.
  std::string word() {
    skip_spaces();
    const char first = at_ < text_.size() ? text_[at_] : ' ';
    if (first == '\'' || first == '"') {
      return quoted(first);
    }
    const size_t begin = at_;
    while (at_ < text_.size() && is_plain_character(text_[at_])) {
      ++at_;
    }
    check(at_ > begin, "the name of an adapter or of a block");
    const std::string result(text_.substr(begin, at_ - begin));
    check_text(result, "composition");
    return result;
  }

  Composition block(int depth) {
    check(depth < kDeepestText, "fewer levels");
    const std::string name = word();
    if (!take('(')) {
      return {BlockKind::kAdapter, name};
    }
    Composition result{block_kind(name)};
    TORCH_CHECK(result.kind != BlockKind::kAdapter, "composition: no block is called '", shown_text(name),
                "'; there are Stack, Fuse, Split, BatchSplit, Parallel, MultiTask and Average");
    bool normalise = true;
    while (!take(')')) {
      check(result.children.empty() || take(','), "a comma or a closing bracket");
      const size_t begin = at_;
      const std::string first = word();
      if (take('=')) {
        keyword(first, result, normalise);
      } else {
        at_ = begin;
        check(result.weights.empty() && result.sizes.empty(), "adapters before weights and sizes");
        result.children.push_back(block(depth + 1));
      }
    }
    finish(result, normalise);
    return result;
  }

  // A number, or several in brackets.
  Json value() {
    skip_spaces();
    const bool is_list = at_ < text_.size() && text_[at_] == '[';
    const size_t end = is_list ? text_.find(']', at_) : text_.find_first_of(",)", at_);
    check(end != std::string_view::npos, "a number, or numbers in brackets,");
    const std::string part(text_.substr(at_, end + (is_list ? 1 : 0) - at_));
    at_ = end + (is_list ? 1 : 0);
    if (const std::string word = part.substr(0, part.find_last_not_of(' ') + 1); word == "True" || word == "False") {
      return word == "True";
    }
    return parse_json(part, "composition: " + part);
  }

  void keyword(const std::string& name, Composition& result, bool& normalise) {
    const bool is_average = result.kind == BlockKind::kAverage;
    if (result.kind == BlockKind::kFuse && name == "name") {
      result.name = word();
    } else if (is_average && name == "normalize_weights") {
      json::read(name, value(), normalise);
    } else if (is_average && name == "weights") {
      json::read(name, value(), result.weights);
    } else if ((result.kind == BlockKind::kSplit && name == "splits") ||
               (result.kind == BlockKind::kBatchSplit && name == "batch_sizes")) {
      const Json given = value();
      is_one_ = given.is_number();
      json::read(name, is_one_ ? Json::array({given}) : given, result.sizes);
    } else {
      TORCH_CHECK(false, "composition: ", to_string(result.kind), " has no argument '", name, "'");
    }
  }

  // As the library's constructors do: weights are divided by their sum, one size is every child's.
  void finish(Composition& result, bool normalise) {
    if (result.kind == BlockKind::kAverage && result.weights.empty() && !result.children.empty()) {
      result.weights.assign(result.children.size(), 1.0 / static_cast<double>(result.children.size()));
    } else if (result.kind == BlockKind::kAverage && normalise) {
      divide_by_sum(result.weights);
    }
    if (std::exchange(is_one_, false)) {
      result.sizes.assign(result.children.size(), result.sizes.front());
    }
  }

  std::string_view text_;
  size_t at_ = 0;
  bool is_one_ = false;  // the block that is read last gave one size for all
};

std::string written_name(const std::string& name) {
  if (!name.empty() && std::all_of(name.begin(), name.end(), is_plain_character)) {
    return name;
  }
  const char quote = name.find('\'') == std::string::npos ? '\'' : '"';
  std::string result(1, quote);
  for (const char c : name) {
    result += std::string(c == quote ? 2 : 1, c);
  }
  return result + quote;
}

template <typename Number>
std::string written_numbers(const char* name, const std::vector<Number>& numbers) {
  return std::string(", ") + name + "=" + Json(numbers).dump();
}

}  // namespace

Composition composition_from_string(std::string_view text) {
  Composition result = CompositionReader(text).read();
  check_composition(result, "composition");
  return result;
}

bool is_composition_text(std::string_view text) {
  const size_t bracket = text.find('(');
  return bracket != std::string_view::npos && block_kind(text.substr(0, bracket)) != BlockKind::kAdapter;
}

std::string composition_to_string(const Composition& composition) {
  if (composition.kind == BlockKind::kAdapter) {
    return written_name(composition.name);
  }
  std::string text = std::string(to_string(composition.kind)) + "(";
  for (size_t i = 0; i < composition.children.size(); ++i) {
    text += (i == 0 ? "" : ", ") + composition_to_string(composition.children[i]);
  }
  if (composition.kind == BlockKind::kAverage) {
    const std::vector<double>& weights = composition.weights;
    const double equal = 1.0 / static_cast<double>(composition.children.size());
    const bool are_equal = std::all_of(weights.begin(), weights.end(), [&](double weight) { return weight == equal; });
    const bool are_normal = std::accumulate(weights.begin(), weights.end(), 0.0) == 1.0;
    text += are_equal ? "" : written_numbers("weights", weights) + (are_normal ? "" : ", normalize_weights=False");
  } else if (!composition.name.empty()) {
    text += ", name=" + written_name(composition.name);
  } else if (composition.kind == BlockKind::kSplit) {
    text += written_numbers("splits", composition.sizes);
  } else if (composition.kind == BlockKind::kBatchSplit) {
    text += written_numbers("batch_sizes", composition.sizes);
  }
  return text + ")";
}

}  // namespace torchgraft
