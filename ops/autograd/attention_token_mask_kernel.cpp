#include <torch/library.h>

// The result is boolean: nothing to differentiate, and no reason to warn about it.
TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) { m.impl("attention_token_mask", torch::CppFunction::makeFallthrough()); }
