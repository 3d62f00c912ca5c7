#include <torchgraft/config/composition_tasks.h>

#include <torchgraft/config/composition_string.h>
#include <torchgraft/registration/parse_json.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

namespace torchgraft {
namespace {

// 0 without a MultiTask.
size_t count_tasks(const Composition& composition) {
  size_t count = composition.kind == BlockKind::kMultiTask ? composition.children.size() : 0;
  for (const Composition& child : composition.children) {
    count = std::max(count, count_tasks(child));
  }
  return count;
}

// A Stack in a Stack runs its adapters in their order, as if they stood in the outer one.
Composition of_task(const Composition& block, size_t task) {
  if (block.kind == BlockKind::kMultiTask) {
    return of_task(block.children[task], task);
  }
  Composition result = block;
  result.children.clear();
  for (const Composition& child : block.children) {
    Composition own = of_task(child, task);
    if (block.kind == BlockKind::kStack && own.kind == BlockKind::kStack) {
      result.children.insert(result.children.end(), own.children.begin(), own.children.end());
    } else {
      result.children.push_back(std::move(own));
    }
  }
  const bool is_one = result.kind == BlockKind::kStack && result.children.size() == 1;
  return is_one ? Composition(result.children.front()) : result;
}

void check_block(const Composition& block, const Composition& whole, size_t tasks, const std::string& what) {
  const auto shown = [&] { return shown_text(composition_to_string(whole)); };
  TORCH_CHECK(block.kind != BlockKind::kMultiTask || block.children.size() == tasks, what, ": ", shown(),
              " has MultiTask blocks with different numbers of children; a row has the same task in all of them: give "
              "them as many");
  TORCH_CHECK(block.kind != BlockKind::kFuse && block.kind != BlockKind::kSplit, what, ": ", shown(), ": ",
              to_string(block.kind), " is for bottlenecks, and the adapters library has MultiTask for LoRAs only; ",
              "compose them under names of their own, and give each row its id in adapter_ids");
  TORCH_CHECK(block.kind != BlockKind::kBatchSplit && block.kind != BlockKind::kParallel, what, ": ", shown(), ": ",
              to_string(block.kind), " and MultiTask both say which rows an adapter gets; compose them under names of ",
              "their own, and give each row its id in adapter_ids");
  for (const Composition& child : block.children) {
    check_block(child, whole, tasks, what);
  }
}

void add_adapters(const Composition& block, bool is_in_task, std::vector<std::string>& names) {
  for (const std::string& name : is_in_task ? adapters_in(block) : std::vector<std::string>()) {
    if (std::find(names.begin(), names.end(), name) == names.end()) {
      names.push_back(name);
    }
  }
  for (const Composition& child : block.children) {
    add_adapters(child, is_in_task || block.kind == BlockKind::kMultiTask, names);
  }
}

}  // namespace

bool has_multi_task(const Composition& composition) { return count_tasks(composition) > 0; }

std::vector<Composition> tasks_of(const Composition& composition) {
  std::vector<Composition> result;
  for (size_t task = 0; task < count_tasks(composition); ++task) {
    result.push_back(of_task(composition, task));
  }
  return result;
}

std::vector<std::string> adapters_in_tasks(const Composition& composition) {
  std::vector<std::string> names;
  add_adapters(composition, false, names);
  return names;
}

void check_tasks(const Composition& composition, const std::string& what) {
  if (const size_t tasks = count_tasks(composition)) {
    check_block(composition, composition, tasks, what);
  }
}

}  // namespace torchgraft
