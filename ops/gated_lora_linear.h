#pragma once

// gated_lora_linear is declared beside gated_lora, with which it shares all but the projection.
#include <torchgraft/ops/gated_lora.h>
