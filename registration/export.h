#pragma once

// Symbols are hidden unless marked: TORCHGRAFT_API for libtorchgraft, TORCHGRAFT_PATCH_API for libtorchgraft_patch.
#define TORCHGRAFT_API __attribute__((visibility("default")))
#define TORCHGRAFT_PATCH_API __attribute__((visibility("default")))
