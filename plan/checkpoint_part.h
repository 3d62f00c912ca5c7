#pragma once

#include <torchgraft/plan/checkpoint.h>
#include <torchgraft/plan/plan.h>

namespace torchgraft {

// Drops from a checkpoint what acts in another file than the model's: of an encoder alone, the decoder's modules; of a
// decoder that reads an encoder's tokens, the encoder's; of attention to a filled cache, the LoRAs on its keys and
// values. Throws c10::Error where layers are named by numbers that count the encoder's, too.
void keep_part_of_model(Checkpoint& checkpoint, const Plan& plan, const Structure& structure);

}  // namespace torchgraft
