#include <torchgraft/config/composition.h>

#include <torchgraft/config/composition_string.h>
#include <torchgraft/config/json_fields.h>
#include <torchgraft/registration/parse_json.h>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>
#include <utility>

namespace torchgraft {
namespace {

using json::Json;
using json::OrderedJson;

constexpr size_t kMostLeaves = 64;  // a composition is unrolled in the graph, at every site

const std::vector<std::pair<BlockKind, const char*>> kBlocks = {
    {BlockKind::kStack, "Stack"},           {BlockKind::kFuse, "Fuse"},         {BlockKind::kSplit, "Split"},
    {BlockKind::kBatchSplit, "BatchSplit"}, {BlockKind::kParallel, "Parallel"}, {BlockKind::kMultiTask, "MultiTask"},
    {BlockKind::kAverage, "Average"}};

// ALLOWED_NESTINGS of adapters/composition.py.
const std::map<BlockKind, std::set<BlockKind>>& allowed_nestings() {
  using Kind = BlockKind;
  static const std::map<Kind, std::set<Kind>> kAllowed = {
      {Kind::kStack,
       {Kind::kAdapter, Kind::kFuse, Kind::kSplit, Kind::kParallel, Kind::kBatchSplit, Kind::kAverage,
        Kind::kMultiTask}},
      {Kind::kFuse, {Kind::kAdapter, Kind::kStack}},
      {Kind::kSplit, {Kind::kAdapter, Kind::kSplit, Kind::kStack, Kind::kBatchSplit, Kind::kAverage}},
      {Kind::kParallel, {Kind::kAdapter, Kind::kStack, Kind::kBatchSplit, Kind::kAverage}},
      {Kind::kMultiTask, {Kind::kAdapter, Kind::kStack, Kind::kAverage, Kind::kFuse}},
      {Kind::kBatchSplit, {Kind::kAdapter, Kind::kStack, Kind::kSplit, Kind::kBatchSplit, Kind::kAverage}},
      {Kind::kAverage, {Kind::kAdapter, Kind::kStack, Kind::kSplit, Kind::kBatchSplit}}};
  return kAllowed;
}

std::string names_of(const std::set<BlockKind>& kinds) {
  std::vector<std::string> names;
  for (const BlockKind kind : kinds) {
    names.emplace_back(to_string(kind));
  }
  return c10::Join(", ", names);
}

std::string shown(const Composition& block) { return shown_text(composition_to_string(block)); }

void check_numbers(const Composition& block, const std::string& what) {
  const size_t count = block.children.size();
  if (block.kind == BlockKind::kAverage) {
    TORCH_CHECK(block.weights.size() == count, what, ": expected as many weights as ", shown(block), " has children, ",
                count, ", got ", block.weights.size());
    for (const double weight : block.weights) {
      TORCH_CHECK(std::isfinite(weight), what, ": expected finite weights in ", shown(block));
    }
  }
  if (block.kind == BlockKind::kSplit || block.kind == BlockKind::kBatchSplit) {
    const char* field = block.kind == BlockKind::kSplit ? "splits" : "batch_sizes";
    TORCH_CHECK(block.sizes.size() == count, what, ": expected ", field, " with a number for each of the ", count,
                " children of ", shown(block), ", got ", block.sizes.size());
    for (const int64_t size : block.sizes) {
      TORCH_CHECK(size >= 0 && size < (int64_t{1} << 31), what, ": expected ", field, " from 0 to 2^31, got ", size);
    }
  }
}

// What validate_composition and the layers' check_composition_valid hold.
void check_block(const Composition& block, int level, const std::string& what) {
  if (block.kind == BlockKind::kAdapter) {
    TORCH_CHECK(!block.name.empty(), what, ": an adapter of the composition has no name");
    return;
  }
  TORCH_CHECK(level <= 1 || block.kind == BlockKind::kStack, what, ": ", shown(block),
              " stands too deep: below the second level the adapters library takes Stack and adapters only");
  TORCH_CHECK(!block.children.empty(), what, ": ", to_string(block.kind), " has no adapters; give it some");
  check_numbers(block, what);
  TORCH_CHECK(block.name.empty() || block.kind == BlockKind::kFuse, what, ": only Fuse has a name");
  const std::set<BlockKind>& allowed = allowed_nestings().at(block.kind);
  bool is_behind_batch_split = false;
  for (const Composition& child : block.children) {
    const bool is_block = child.kind != BlockKind::kAdapter;
    TORCH_CHECK(allowed.count(child.kind), what, ": the adapters library cannot nest ", shown(child), " inside ",
                to_string(block.kind), ", which takes ", names_of(allowed));
    TORCH_CHECK(!is_block || block.kind != BlockKind::kStack || level < 1, what, ": ", shown(child),
                " stands too deep: a Stack within another block takes adapters only");
    check_block(child, level + 1, what);
    // The library repeats rows once, and cuts them for each Parallel anew.
    TORCH_CHECK(child.kind != BlockKind::kParallel || !is_behind_batch_split, what, ": ", shown(block), " has a ",
                "Parallel behind a BatchSplit, which the adapters library cannot run: it splits the batch in the ",
                "first layer and the repeated rows in the others; put the BatchSplit into each part of the Parallel");
    is_behind_batch_split = is_behind_batch_split || child.kind == BlockKind::kBatchSplit;
    TORCH_CHECK(child.kind != BlockKind::kParallel || parallel_channels(child) == parallel_channels(block), what, ": ",
                shown(block), " has Parallel blocks with different numbers of children, whose rows do not match; ",
                "give all of them as many");
  }
}

void add_adapters(const Composition& composition, std::vector<std::string>& names) {
  if (composition.kind == BlockKind::kAdapter) {
    if (std::find(names.begin(), names.end(), composition.name) == names.end()) {
      names.push_back(composition.name);
    }
    return;
  }
  for (const Composition& child : composition.children) {
    add_adapters(child, names);
  }
}

size_t count_leaves(const Composition& composition) {
  size_t count = composition.kind == BlockKind::kAdapter ? 1 : 0;
  for (const Composition& child : composition.children) {
    count += count_leaves(child);
  }
  return count;
}

const char* numbers_field(BlockKind kind) {
  switch (kind) {
    case BlockKind::kAverage:
      return "weights";
    case BlockKind::kSplit:
      return "splits";
    case BlockKind::kBatchSplit:
      return "batch_sizes";
    default:
      return nullptr;
  }
}

Composition read_block(const Json& json) {
  TORCH_CHECK(json.is_object() && json.contains("type") && json.at("type").is_string() && json.contains("children") &&
                  json.at("children").is_array(),
              "composition: expected {\"type\": ..., \"children\": [...]}, got ", shown_json(json));
  const auto type = json.at("type").get<std::string>();
  for (const auto& [key, value] : json.items()) {
    TORCH_CHECK(key == "type" || key == "children" || key == "kwargs", "composition: ", shown_json(Json(type)),
                " has a key '", shown_text(key), "', which is not known");
  }
  Composition block;
  if (type == "single") {
    const Json& children = json.at("children");
    TORCH_CHECK(children.size() == 1 && children[0].is_string() && !json.contains("kwargs"),
                "composition: expected one adapter's name in ", shown_json(json));
    block.name = children[0].get<std::string>();
    return block;
  }
  const auto found =
      std::find_if(kBlocks.begin(), kBlocks.end(), [&](const auto& known) { return known.second == type; });
  TORCH_CHECK(found != kBlocks.end(), "composition: no block is called ", shown_json(Json(type)),
              "; there are Stack, Fuse, Split, BatchSplit, Parallel, MultiTask and Average");
  block.kind = found->first;
  for (const Json& child : json.at("children")) {
    block.children.push_back(read_block(child));
  }
  if (block.kind == BlockKind::kAverage) {
    block.weights.assign(block.children.size(), 1.0 / static_cast<double>(block.children.size()));
  }
  const char* field = numbers_field(block.kind);
  const Json kwargs = json.contains("kwargs") ? json.at("kwargs") : Json::object();
  TORCH_CHECK(kwargs.is_object(), "composition: expected kwargs to be an object, got ", shown_json(kwargs));
  for (const auto& [key, value] : kwargs.items()) {
    if (block.kind == BlockKind::kFuse && key == "name") {
      json::read(key, value, block.name);
      continue;
    }
    TORCH_CHECK(field && key == field, "composition: ", type, " has no argument '", shown_text(key), "'");
    block.kind == BlockKind::kAverage ? json::read(key, value, block.weights) : json::read(key, value, block.sizes);
  }
  return block;
}

OrderedJson written_block(const Composition& block) {
  OrderedJson result;
  result["type"] = block.kind == BlockKind::kAdapter ? "single" : to_string(block.kind);
  result["children"] = OrderedJson::array();
  if (block.kind == BlockKind::kAdapter) {
    result["children"].push_back(block.name);
    return result;
  }
  for (const Composition& child : block.children) {
    result["children"].push_back(written_block(child));
  }
  if (const char* field = numbers_field(block.kind)) {
    result["kwargs"][field] = block.kind == BlockKind::kAverage ? OrderedJson(block.weights) : OrderedJson(block.sizes);
  }
  if (!block.name.empty()) {
    result["kwargs"]["name"] = block.name;
  }
  return result;
}

}  // namespace

const char* to_string(BlockKind kind) {
  for (const auto& [known, name] : kBlocks) {
    if (known == kind) {
      return name;
    }
  }
  return "an adapter";
}

std::vector<std::string> adapters_in(const Composition& composition) {
  std::vector<std::string> names;
  add_adapters(composition, names);
  return names;
}

const std::string& first_adapter(const Composition& composition) {
  return composition.kind == BlockKind::kAdapter ? composition.name : first_adapter(composition.children.front());
}

const std::string& last_adapter(const Composition& composition) {
  return composition.kind == BlockKind::kAdapter ? composition.name : last_adapter(composition.children.back());
}

std::string fusion_name(const Composition& fuse) {
  std::string names;
  for (const Composition& child : fuse.children) {
    names += (names.empty() ? "" : ",") + last_adapter(child);
  }
  return fuse.name.empty() ? names : fuse.name;
}

std::vector<std::string> fusion_names(const Composition& composition) {
  std::vector<std::string> names;
  if (composition.kind == BlockKind::kFuse) {
    names.push_back(fusion_name(composition));
  }
  for (const Composition& child : composition.children) {
    for (const std::string& name : fusion_names(child)) {
      if (std::find(names.begin(), names.end(), name) == names.end()) {
        names.push_back(name);
      }
    }
  }
  return names;
}

bool splits_inputs(const Composition& composition) {
  return composition.kind == BlockKind::kSplit || composition.kind == BlockKind::kBatchSplit ||
         std::any_of(composition.children.begin(), composition.children.end(), splits_inputs);
}

bool has_parallel(const Composition& composition) {
  return composition.kind == BlockKind::kParallel ||
         std::any_of(composition.children.begin(), composition.children.end(), has_parallel);
}

int64_t parallel_channels(const Composition& composition) {
  if (composition.kind == BlockKind::kParallel) {
    return static_cast<int64_t>(composition.children.size());
  }
  int64_t most = 1;
  for (const Composition& child : composition.children) {
    most = std::max(most, parallel_channels(child));
  }
  return most;
}

Composition with_renamed(Composition composition, const std::string& name, const std::string& new_name) {
  if (composition.kind == BlockKind::kAdapter && composition.name == name) {
    composition.name = new_name;
  }
  const std::string layer = composition.kind == BlockKind::kFuse ? fusion_name(composition) : "";
  for (Composition& child : composition.children) {
    child = with_renamed(std::move(child), name, new_name);
  }
  if (composition.kind == BlockKind::kFuse && fusion_name(composition) != layer) {
    composition.name = layer;  // the AdapterFusion layer keeps its name
  }
  return composition;
}

void check_composition(const Composition& composition, const std::string& what) {
  TORCH_CHECK(composition.kind != BlockKind::kAdapter, what,
              ": expected a block such as Stack(a, b), got the adapter '", shown_text(composition.name), "'");
  const size_t leaves = count_leaves(composition);
  TORCH_CHECK(leaves <= kMostLeaves, what, ": expected at most ", kMostLeaves, " adapters in a composition, got ",
              leaves);
  check_block(composition, 0, what);
}

Composition composition_from_json(std::string_view text) {
  const Json json = parse_json(text, "composition");
  check_texts(json, "composition");
  Composition composition = read_block(json);
  check_composition(composition, "composition");
  return composition;
}

std::string composition_to_json(const Composition& composition) {
  return written_block(composition).dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

void divide_by_sum(std::vector<double>& weights) {
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  TORCH_CHECK(sum != 0.0, "composition: the weights of an Average sum to 0 and cannot be normalised");
  for (double& weight : weights) {
    weight /= sum;
  }
}

Composition normalised(Composition composition) {
  if (composition.kind == BlockKind::kAverage) {
    divide_by_sum(composition.weights);
  }
  for (Composition& child : composition.children) {
    child = normalised(std::move(child));
  }
  return composition;
}

}  // namespace torchgraft
