// Only includes the anchor. Prints the version of the library that the linker therefore had to keep.

#include <torchgraft/registration/library.h>

#include <cstdio>

int main() {
  std::puts(torchgraft::version());
  return 0;
}
