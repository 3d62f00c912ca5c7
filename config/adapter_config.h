#pragma once

// Everything about adapter configurations.
#include <torchgraft/config/check_supported.h>
#include <torchgraft/config/config_json.h>
#include <torchgraft/config/config_string.h>
#include <torchgraft/config/config_union.h>
#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/config/method_configs.h>
#include <torchgraft/config/named_configs.h>
