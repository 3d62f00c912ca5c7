#include <torchgraft/ops/cpu/vectorized/token_blocks.h>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {

void token_product(const DotProduct& job) { product_by_tokens<Singles>(job); }

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
