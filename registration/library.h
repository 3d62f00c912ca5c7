#pragma once

#include <torchgraft/registration/export.h>

// Include this in one file of a C++ host that links libtorchgraft and calls the ops only through TorchScript: such a
// host uses no symbol of the library, and linkers drop a library of which nothing is used. The reference below keeps
// it.

namespace torchgraft {

// The version of the library that is loaded, e.g. "0.1.0".
TORCHGRAFT_API const char* version();

// Does nothing but be referred to. Returns 0.
TORCHGRAFT_API int link_anchor();

// Evaluated when the host starts; being an initialiser with external linkage it is not optimised away.
inline const int kLinkAnchor = link_anchor();

}  // namespace torchgraft
