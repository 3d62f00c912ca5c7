// grafts BASE.pt OUT.pt: grafts a fresh UniPELT adapter named "task" onto BASE and saves it. No Python is involved.

#include <torchgraft/config/adapter_config.h>
#include <torchgraft/patch/graft.h>
#include <torchgraft/plan/adapter_weights.h>
#include <torchgraft/plan/plan.h>
#include <torchgraft/plan/structure.h>

#include <torch/script.h>

#include <iostream>

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
    torchgraft::graft(base, {adapter}).save(argv[2]);
    std::cout << structure.layers.size() << " layers\n";
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
