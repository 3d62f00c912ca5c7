#include <torchgraft/patch/inspect.h>

#include <torchgraft/patch/canonicalise/canonicalise.h>
#include <torchgraft/patch/module/graft_options.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/sites/apply_sites.h>

namespace torchgraft {

Structure inspect(const torch::jit::Module& module, const std::optional<Structure>& sites) {
  const bool grafted = is_grafted(module);
  const CanonicalGraph canonical = canonicalise(module, grafted ? "base_forward" : "forward");
  return choose_sites(canonical, module, grafted && !sites ? remembered_sites(module) : sites).structure;
}

}  // namespace torchgraft
