// grafts BASE.pt OUT.pt: grafts a fresh UniPELT adapter named "task" onto BASE and saves it. No Python is involved.

#include <torchgraft/config/adapter_config.h>
#include <torchgraft/patch/adapter_pool.h>
#include <torchgraft/patch/forward_inputs.h>
#include <torchgraft/patch/graft.h>
#include <torchgraft/patch/life.h>
#include <torchgraft/patch/save_adapter.h>
#include <torchgraft/plan/adapter_weights.h>
#include <torchgraft/plan/plan.h>
#include <torchgraft/plan/safetensors.h>
#include <torchgraft/plan/structure.h>

#include <torch/script.h>

#include <iostream>
#include <string>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: grafts BASE.pt OUT.pt\n";
    return 2;
  }
  try {
    const torch::jit::Module base = torch::jit::load(argv[1]);
    const torchgraft::Structure structure = torchgraft::inspect(base);
    torchgraft::AdapterSpec adapter;
    adapter.name = "task";
    adapter.config = torchgraft::unipelt_config();
    const torch::jit::Module grafted = torchgraft::graft(base, {adapter});
    grafted.save(argv[2]);
    // What a server does with an adapter that comes later.
    torchgraft::save_adapter(grafted, "task", std::string(argv[2]) + ".adapter");
    const torch::jit::Module loaded = torchgraft::load_adapter(grafted, std::string(argv[2]) + ".adapter", "again");
    if (torchgraft::list_adapters(torchgraft::remove_adapters(loaded, {"task"})).front().name != "again") {
      return 3;
    }
    std::cout << structure.layers.size() << " layers\n";
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
