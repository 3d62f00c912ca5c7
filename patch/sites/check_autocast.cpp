#include <torchgraft/patch/sites/check_autocast.h>

#include <torchgraft/patch/graph/autocast_regions.h>
#include <torchgraft/patch/graph/writes.h>

#include <c10/util/Exception.h>

namespace torchgraft {

void check_autocast(const GraphSites& sites, torch::jit::Graph& graph, c10::Device device) {
  const auto under_autocast = nodes_under_autocast(graph, c10::DeviceTypeName(device.type(), /*lower_case=*/true));
  for (size_t i = 0; i < sites.layers.size(); ++i) {
    const LayerSites& layer = sites.layers[i];
    for (const torch::jit::Node* node : {layer.attention, layer.query.node, layer.key.node, layer.value.node}) {
      TORCH_CHECK(!node || under_autocast.count(node) == 0, "graft: layer ", sites.structure.layers[i].number,
                  " runs under torch.autocast, which the module's code enters itself: ", described(node),
                  ". Its casts reach no adapter. Leave autocast out of the module, and call the grafted module under "
                  "torch.autocast, or convert it, as by module.to(torch.bfloat16)");
    }
  }
}

}  // namespace torchgraft
