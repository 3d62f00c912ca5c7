#include <torchgraft/patch/module/trial_run.h>

#include <torchgraft/patch/canonicalise/decompose_optimized.h>
#include <torchgraft/patch/canonicalise/inline_forks.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/inline_all.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/no_warnings.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/insert/addmm_form.h>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/constant_propagation.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <algorithm>
#include <iterator>
#include <utility>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using Memo = c10::IValue::HashIdentityIValueMap;

// Effects that PyTorch counts as such. Runs work on copies of attributes, and of the rest nobody sees anything.
bool is_harmless(const Node* node) {
  const std::string kind = node->kind().toQualString();
  return only_complains(node) || node->kind() == c10::prim::SetAttr || node->kind() == c10::prim::Enter ||
         node->kind() == c10::prim::Exit || is_aten(node, {"set_grad_enabled", "get_autocast_dtype"}) ||
         kind.starts_with("aten::is_");
}

// The tensors that nodes of `kind` bring into `graph` and that something may write into.
std::vector<const torch::jit::Value*> written_tensors(const std::shared_ptr<Graph>& graph, c10::Symbol kind) {
  const Writes writes(graph);
  std::vector<const torch::jit::Value*> result;
  for_each_node(graph->block(), [&](Node* node) {
    if (node->kind() == kind && is_tensor(node->output()) && writes.reach(node->output())) {
      result.push_back(node->output());
    }
  });
  return result;
}

// Switches autocast off for CPU and GPU.
class NoAutocast {
 public:
  NoAutocast() {
    for (size_t i = 0; i < std::size(kDevices); ++i) {
      were_on_[i] = at::autocast::is_autocast_enabled(kDevices[i]);
      at::autocast::set_autocast_enabled(kDevices[i], false);
    }
  }
  NoAutocast(const NoAutocast&) = delete;
  NoAutocast& operator=(const NoAutocast&) = delete;
  ~NoAutocast() {
    for (size_t i = 0; i < std::size(kDevices); ++i) {
      at::autocast::set_autocast_enabled(kDevices[i], were_on_[i]);
    }
  }

 private:
  static constexpr at::DeviceType kDevices[] = {at::kCPU, at::kCUDA};
  bool were_on_[std::size(kDevices)];
};

void add_in_double(const at::Tensor& tensor, Memo& memo) {
  if (tensor.defined() && at::isFloatingType(tensor.scalar_type()) && !tensor.is_quantized()) {
    memo.emplace(tensor, tensor.detach().to(at::kDouble));
  }
}

}  // namespace

std::shared_ptr<Graph> graph_of_run(const Module& module, const char* method) {
  auto graph = torch::jit::toGraphFunction(module.get_method(method).function()).graph()->copy();
  inline_all(*graph);
  inline_forks(graph);
  inline_all(*graph);          // what forks call
  decompose_optimized(graph);  // one form for those who read the graph
  read_addmm_form(graph, module);
  for_each_node(graph->block(), [&](Node* node) {
    if (node->kind() == c10::prim::GetAttr && node->s(c10::attr::name) == "training") {
      const torch::jit::WithInsertPoint before(node);
      node->output()->replaceAllUsesWith(graph->insertConstant(false));
    }
  });
  torch::jit::ConstantPropagation(graph);
  torch::jit::EliminateDeadCode(graph);
  return graph;
}

TrialRun::TrialRun(Module module, const std::shared_ptr<Graph>& graph)
    : module_(std::move(module)),
      tensors_(written_tensors(graph, c10::prim::GetAttr).empty() ? Tensors::kShared : Tensors::kCopied) {}

TrialRun TrialRun::in_double() const {
  TrialRun result = *this;
  result.tensors_ = Tensors::kInDouble;
  return result;
}

// Objects, lists and dicts are copied, but not packed weights; tensors as tensors_ says. What is in the memo is not
// copied again.
Module TrialRun::copy() const {
  Memo memo;
  for (const Module& inner : module_.modules()) {
    for (const c10::IValue& slot : inner._ivalue()->slots()) {
      if (is_packed_object(slot)) {
        memo.emplace(slot, slot);
      }
    }
  }
  if (tensors_ != Tensors::kCopied) {
    const auto add = [&](const at::Tensor& tensor) {
      tensors_ == Tensors::kShared ? void(memo.emplace(tensor, tensor)) : add_in_double(tensor, memo);
    };
    for (const at::Tensor& parameter : module_.parameters()) {
      add(parameter);
    }
    for (const at::Tensor& buffer : module_.buffers()) {
      add(buffer);
    }
  }
  Module result(c10::IValue(module_._ivalue()).deepcopy(memo).toObject());
  result.eval();
  return result;
}

c10::IValue TrialRun::operator()(const char* method, const Arguments& arguments,
                                 const std::optional<at::Tensor>& adapter_ids) const {
  const at::NoGradGuard no_grad;
  const NoAutocast no_autocast;
  const NoWarnings no_warnings;
  // One run: optimising the graph would take longer.
  const torch::jit::GraphOptimizerEnabledGuard unoptimised(false);
  Memo memo;
  if (tensors_ == Tensors::kInDouble) {
    for (const c10::IValue& argument : arguments) {
      argument.visit([&](const c10::IValue& part) {
        if (part.isTensor()) {
          add_in_double(part.toTensor(), memo);
        }
        return false;
      });
    }
  }
  Arguments copies;
  std::transform(arguments.begin(), arguments.end(), std::back_inserter(copies),
                 [&](const c10::IValue& argument) { return argument.deepcopy(memo); });
  torch::jit::Kwargs named;
  if (adapter_ids) {
    named.emplace("adapter_ids", *adapter_ids);
  }
  return copy().get_method(method)(std::move(copies), named);
}

std::string reason_not_to_run(const std::shared_ptr<Graph>& graph) {
  std::string reason;
  for_each_node(graph->block(), [&](Node* node) {
    if (!reason.empty() || !node->blocks().empty()) {
      return;
    }
    if (draws_random_numbers(node)) {
      reason = "its forward draws random numbers (" + described(node) + ")";
    } else if (!is_writer(node) && node->hasSideEffects() && !is_harmless(node)) {
      reason = "its forward has side effects (" + described(node) + ")";
    }
  });
  if (reason.empty() && !written_tensors(graph, c10::prim::Constant).empty()) {
    reason = "its forward writes into a constant of its own";
  }
  return reason;
}

}  // namespace torchgraft
