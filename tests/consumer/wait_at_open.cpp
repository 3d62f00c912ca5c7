// For LD_PRELOAD: opening PATH waits as long as there is a file PATH.wait, as a file system that does not answer would.

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdarg>
#include <string>

namespace {

void wait_for(const char* path) {
  while (access((std::string(path) + ".wait").c_str(), F_OK) == 0) {
    usleep(2000);
  }
}

}  // namespace

extern "C" int open(const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(more, mode_t) : 0;
  va_end(more);
  wait_for(path);
  static const auto original = reinterpret_cast<int (*)(const char*, int, ...)>(dlsym(RTLD_NEXT, "open"));
  return original(path, flags, mode);
}
