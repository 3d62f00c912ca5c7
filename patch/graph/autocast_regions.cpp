#include <torchgraft/patch/graph/autocast_regions.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Node;
using torch::jit::Value;
using Nodes = std::set<const Node*>;

// A scripted `with torch.autocast(...)` that is open.
struct Region {
  const Value* context = nullptr;
  std::string device;      // "cpu"; empty: not known
  bool is_enabled = true;  // also where the graph does not show it
};

// Those of torch.amp, torch.cpu.amp and torch.cuda.amp. Nothing else casts: no_grad, a profiler's record_function.
bool is_autocast(const Value* context) {
  const auto type = context->type()->cast<c10::ClassType>();
  const std::string name = type && type->name() ? type->name()->qualifiedName() : "";
  return name.starts_with("__torch__.torch.") && name.find(".amp.autocast_mode.") != std::string::npos;
}

// What __init__ has set.
Region region_of(const Value* context) {
  Region region;
  region.context = context;
  for (const auto& use : context->uses()) {
    const Node* user = use.user;
    const auto value =
        user->kind() == c10::prim::SetAttr && use.offset == 0 ? torch::jit::toIValue(user->input(1)) : std::nullopt;
    if (value && value->isBool() && user->s(c10::attr::name) == "_enabled") {
      region.is_enabled = value->toBool();
    } else if (value && value->isString() && user->s(c10::attr::name) == "device") {
      region.device = value->toStringRef();
    }
  }
  return region;
}

// Each device has an autocast of its own, and of one device the innermost region counts. `device`: empty for any.
bool casts(const std::vector<Region>& open, const std::string& device) {
  std::map<std::string, bool> by_device;
  for (const Region& region : open) {
    if (device.empty() || region.device.empty() || region.device == device) {
      by_device[region.device] = region.is_enabled;
    }
  }
  return std::any_of(by_device.begin(), by_device.end(), [](const auto& entry) { return entry.second; });
}

// `open`: the regions around `block`.
void add_nodes(Block* block, const std::string& device, std::vector<Region> open, Nodes& result) {
  for (Node* node : block->nodes()) {
    if (node->kind() == c10::prim::Enter && is_autocast(node->input(0))) {
      open.push_back(region_of(node->input(0)));
    } else if (node->kind() == c10::prim::Exit) {
      std::erase_if(open, [&](const Region& region) { return region.context == node->input(0); });
    } else if (casts(open, device)) {
      result.insert(node);
    }
    for (Block* inner : node->blocks()) {
      add_nodes(inner, device, open, result);
    }
  }
}

}  // namespace

Nodes nodes_under_autocast(torch::jit::Graph& graph, const std::string& device) {
  Nodes result;
  add_nodes(graph.block(), device, {}, result);
  return result;
}

}  // namespace torchgraft
