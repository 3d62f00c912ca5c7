// Stops a process that loads this library with a torch of another minor version than it was built for. Nothing else
// would tell: the C++ interface changes without an error of the linker.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/version.h>

#include <stdexcept>
#include <string>

namespace torchgraft {
namespace {

// The bytes of a version of LibTorch: major, minor, patch, and five that do not count.
constexpr int kMajor = 56, kMinor = 48, kPatch = 40;

std::string part(uint64_t version, int shift) { return std::to_string((version >> shift) & 0xff); }

std::string minor_text(uint64_t version) { return part(version, kMajor) + "." + part(version, kMinor); }

// Runs before this library registers operators: a priority comes before static objects, which have none. No class of
// LibTorch is used, since it may be another one here.
[[gnu::constructor(101)]] void check_torch() {
  constexpr uint64_t kBuiltFor = TORCH_ABI_VERSION;
  const uint64_t loaded = aoti_torch_abi_version();
  if (loaded >> kMinor != kBuiltFor >> kMinor) {
    throw std::runtime_error(
        "torchgraft: libtorchgraft.so was built for torch " TORCH_VERSION ", and this process has torch " +
        minor_text(loaded) + "." + part(loaded, kPatch) + "; load a libtorchgraft.so that was built for torch " +
        minor_text(loaded) + ", or run this one with torch " + minor_text(kBuiltFor));
  }
}

}  // namespace
}  // namespace torchgraft
