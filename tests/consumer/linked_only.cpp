// Includes nothing of torchgraft: loads a TorchScript file whose forward calls torchgraft's operators, runs it on ones
// of the given sizes and prints the sum of what comes out.

#include <torch/script.h>

#include <cstdlib>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: linked_only MODEL.pt SIZE...\n";
    return 2;
  }
  std::vector<int64_t> sizes;
  for (int index = 2; index < argc; ++index) {
    sizes.push_back(std::atoll(argv[index]));
  }
  try {
    torch::jit::Module module = torch::jit::load(argv[1]);
    const c10::IValue result = module.forward({torch::ones(sizes)});
    std::cout << result.toTensor().sum().item<double>() << "\n";
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
