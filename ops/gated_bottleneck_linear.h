#pragma once

// gated_bottleneck_linear is declared beside gated_bottleneck, with which it shares all but the linear map.
#include <torchgraft/ops/gated_bottleneck.h>
