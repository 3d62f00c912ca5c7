#pragma once

// The weights of an adapter, and where they come from.
#include <torchgraft/plan/init_weights.h>
#include <torchgraft/plan/module_weights.h>
#include <torchgraft/plan/read_adapter_hub.h>
