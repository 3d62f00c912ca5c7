// For LD_PRELOAD: programs that select rows of a tensor (Tensor::index_select) find no memory while there is a file
// $NO_INDEX_SELECT. libtorch's own operators (an embedding is one) do.

#include <dlfcn.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

constexpr const char* kName = "_ZN2at4_ops12index_select4callERKNS_6TensorElS4_";

bool is_of_libtorch(const void* code) {
  Dl_info info;
  return dladdr(code, &info) != 0 && info.dli_fname && std::strstr(info.dli_fname, "libtorch_");
}

}  // namespace

// at::_ops::index_select::call, whose result is a tensor at `result`.
extern "C" void* index_select(void* result, const void* self, int64_t dimension,
                              const void* index) __asm__("_ZN2at4_ops12index_select4callERKNS_6TensorElS4_");

extern "C" void* index_select(void* result, const void* self, int64_t dimension, const void* index) {
  const char* path = std::getenv("NO_INDEX_SELECT");
  if (path && access(path, F_OK) == 0 && !is_of_libtorch(__builtin_return_address(0))) {
    throw std::bad_alloc();
  }
  static const auto original = reinterpret_cast<decltype(&index_select)>(dlsym(RTLD_NEXT, kName));
  return original(result, self, dimension, index);
}
