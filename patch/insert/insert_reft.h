#pragma once

#include <torchgraft/patch/insert/inserter.h>

namespace torchgraft {

// Puts the op of a ReFT behind the layer: whatever read the layer's end reads its result. It has no gate.
void insert_reft(Inserter& inserter, const Slot& slot);

}  // namespace torchgraft
