#include <torchgraft/patch/adapters/one_version.h>

#include <torchgraft/patch/adapters/directory_lock.h>

#include <c10/util/Exception.h>

#include <sys/stat.h>

#include <chrono>
#include <exception>
#include <optional>
#include <thread>
#include <tuple>

namespace torchgraft {
namespace {

constexpr int kMostReads = 100;
constexpr int kMostWaits = 100;  // for the marker
constexpr std::chrono::milliseconds kPause(5);

// What tells a version of a file from others. A file that is replaced has another number, one that is written into has
// another time.
using FileVersion = std::tuple<dev_t, ino_t, off_t, time_t, long, time_t, long>;

std::vector<std::optional<FileVersion>> versions_of(const std::string& directory,
                                                    const std::vector<std::string>& files) {
  std::vector<std::optional<FileVersion>> result;
  for (const std::string& name : files) {
    struct stat status{};
    if (stat((directory + "/" + name).c_str(), &status) == 0) {
      result.emplace_back(std::in_place, status.st_dev, status.st_ino, status.st_size, status.st_mtim.tv_sec,
                          status.st_mtim.tv_nsec, status.st_ctim.tv_sec, status.st_ctim.tv_nsec);
    } else {
      result.emplace_back();
    }
  }
  return result;
}

bool is_missing(const std::string& path) {
  struct stat status{};
  return stat(path.c_str(), &status) != 0;
}

bool is_regular(const std::string& path) {
  struct stat status{};
  return stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

}  // namespace

bool has_marker(const std::string& directory, const std::string& marker) {
  const std::string path = directory + "/" + marker;
  bool is_there = is_regular(path);
  const auto look = [&] { is_there = is_regular(path); };
  for (int waits = 0; !is_there && look_between_updates(directory, look) == Look::kLocked; ++waits) {
    if (waits == kMostWaits) {
      break;
    }
    std::this_thread::sleep_for(kPause);
    look();
  }
  return is_there;
}

void read_one_version(const std::string& directory, const std::vector<std::string>& files, const std::string& marker,
                      const std::function<void()>& read) {
  for (int reads = 0; reads < kMostReads; ++reads) {
    const bool was_there = has_marker(directory, marker);
    const auto before = versions_of(directory, files);
    if (was_there && is_missing(directory + "/" + marker)) {
      continue;  // the next update has begun
    }
    std::exception_ptr failure;
    try {
      read();
    } catch (...) {
      failure = std::current_exception();
    }
    if (versions_of(directory, files) != before) {
      std::this_thread::sleep_for(kPause);
    } else if (failure) {
      std::rethrow_exception(failure);
    } else {
      return;
    }
  }
  TORCH_CHECK(false, directory, ": its files changed during each of ", kMostReads,
              " attempts to read them; read it when nobody writes into it");
}

}  // namespace torchgraft
