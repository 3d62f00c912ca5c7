// For LD_PRELOAD: the KILL_AT_RENAME-th call of rename() ends the process, before it has an effect, as `kill -9` would.

#include <dlfcn.h>

#include <csignal>
#include <cstdlib>

extern "C" int rename(const char* from, const char* to) noexcept {
  static int calls = 0;
  const char* last = std::getenv("KILL_AT_RENAME");
  if (last != nullptr && ++calls == std::atoi(last)) {
    raise(SIGKILL);
  }
  static const auto original = reinterpret_cast<int (*)(const char*, const char*)>(dlsym(RTLD_NEXT, "rename"));
  return original(from, to);
}
