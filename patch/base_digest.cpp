#include <torchgraft/patch/base_digest.h>
#include <torchgraft/patch/graph/inline_all.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <c10/util/hash.h>

#include <map>

namespace torchgraft {
namespace {

std::string digest_of(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.detach().cpu().contiguous();
  const std::string kind = c10::str(dense.scalar_type(), " ", dense.sizes(), " ");
  const std::string bytes(static_cast<const char*>(dense.const_data_ptr()), dense.nbytes());
  return kind + c10::sha1(kind + bytes).str() + "\n";
}

}  // namespace

std::string base_digest(const torch::jit::Module& module) {
  TORCH_CHECK(module.find_method("base_forward"), "base_digest: expected a grafted module, got one without adapters");
  std::map<std::string, std::string> digests;
  const auto add = [&](const std::string& name, const at::Tensor& tensor) {
    if (!name.starts_with("adapters.") && tensor.defined() && tensor.layout() == at::kStrided) {
      digests[name] = digest_of(tensor);
    }
  };
  for (const auto& parameter : module.named_parameters()) {
    add(parameter.name, parameter.value);
  }
  for (const auto& buffer : module.named_buffers()) {
    add(buffer.name, buffer.value);
  }
  std::string text = "base\n";
  for (const auto& [name, digest] : digests) {
    text += name + " " + digest;
  }
  const auto graph = module.get_method("base_forward").graph()->copy();
  inline_all(*graph);
  for_each_node(graph->block(), [&](const torch::jit::Node* node) {
    const auto constant = node->kind() == c10::prim::Constant ? resolve_constant(node->output()) : std::nullopt;
    if (constant && constant->isTensor() && constant->toTensor().layout() == at::kStrided) {
      text += digest_of(constant->toTensor());
    }
  });
  return c10::sha1(text).str();
}

}  // namespace torchgraft
