#include <torchgraft/patch/sites/attention_class.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <sstream>

namespace torchgraft {

using torch::jit::Module;

std::string attention_class(const Module& module, const Structure& structure) {
  const Layer& layer = structure.layers.front();
  c10::IValue holder = module._ivalue();
  std::istringstream path(layer.query ? layer.query->path : "");
  std::string class_name;
  for (std::string name; std::getline(path, name, '.');) {
    if (!holder.isModule() || !holder.toModule().hasattr(name)) {
      return "";
    }
    class_name = demangled_name(holder.type());
    holder = holder.toModule().attr(name);
  }
  return class_name;
}

}  // namespace torchgraft
