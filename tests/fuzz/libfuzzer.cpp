// The entry of clang's libFuzzer. TORCHGRAFT_TARGET is the name of one target.

#include "targets.h"

#include <cstddef>
#include <cstdint>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto kTarget = torchgraft::fuzz::targets().at(TORCHGRAFT_TARGET);
  torchgraft::fuzz::run(kTarget, {reinterpret_cast<const char*>(data), size});
  return 0;
}
