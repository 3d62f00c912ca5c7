#include <torchgraft/registration/library.h>

namespace torchgraft {

const char* version() { return TORCHGRAFT_VERSION; }

int link_anchor() { return 0; }

}  // namespace torchgraft
