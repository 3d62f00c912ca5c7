#include <torchgraft/patch/insert/share_attributes.h>

#include <map>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Node;
using torch::jit::Value;

class Sharing {
 public:
  explicit Sharing(Value* self) : self_(self) {}

  void in(Block* block) {
    std::vector<Key> read_here;
    for (auto node = block->nodes().begin(); node != block->nodes().end();) {
      Node* current = *node++;
      for (Block* inner : current->blocks()) {
        in(inner);
      }
      if (!is_of_adapters(current)) {
        continue;
      }
      const Key key{current->input(), current->s(c10::attr::name)};
      const auto [found, is_new] = read_.emplace(key, current->output());
      if (is_new) {
        of_adapters_.insert(current->output());
        read_here.push_back(key);
      } else {
        current->output()->replaceAllUsesWith(found->second);
        current->destroy();
      }
    }
    for (const Key& key : read_here) {
      read_.erase(key);
    }
  }

 private:
  using Key = std::pair<Value*, std::string>;

  bool is_of_adapters(const Node* node) const {
    return node->kind() == c10::prim::GetAttr &&
           (of_adapters_.count(node->input()) || (node->input() == self_ && node->s(c10::attr::name) == "adapters"));
  }

  Value* self_;
  std::map<Key, Value*> read_;  // above the current node, in its block and those around it
  std::unordered_set<const Value*> of_adapters_;
};

}  // namespace

void share_attributes(torch::jit::Graph& graph) { Sharing(graph.inputs()[0]).in(graph.block()); }

}  // namespace torchgraft
