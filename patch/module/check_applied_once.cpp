#include <torchgraft/patch/module/check_applied_once.h>

#include <c10/util/Exception.h>

namespace torchgraft {

void check_applied_once(const Adapter& adapter, const GraphSites& sites, const char* what) {
  for (const PlannedModule& module : adapter.plan) {
    const size_t position = sites.structure.position(module.layer);
    const LinearSite* site = lora_site(sites.layers.at(position), module.site);
    TORCH_CHECK(!site || !site->is_used_elsewhere, what, ": '", adapter.name, "' has ", module.site, " of layer ",
                module.number,
                ", on a linear map whose weight the model applies in other places, too; the library that trained the "
                "adapter changes all of them, which is not supported. A fresh adapter acts in the layer alone");
  }
}

}  // namespace torchgraft
