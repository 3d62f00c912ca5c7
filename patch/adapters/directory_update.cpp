#include <torchgraft/patch/adapters/directory_update.h>

#include <torchgraft/plan/safetensors.h>
#include <torchgraft/plan/temporary_file.h>

#include <c10/util/Exception.h>
#include <c10/util/ScopeExit.h>

#include <unistd.h>

#include <filesystem>

namespace torchgraft {
namespace fs = std::filesystem;

namespace {

// Files of names that only torchgraft gives.
std::vector<std::string> temporary_files(const std::string& directory) {
  std::error_code ignored;
  std::vector<std::string> paths;
  for (fs::directory_iterator entry(directory, ignored), end; !ignored && entry != end; entry.increment(ignored)) {
    const std::string name = entry->path().filename().string();
    if (name.starts_with('.') && name.ends_with(kTemporaryEnd)) {
      paths.push_back(entry->path().string());
    }
  }
  return paths;
}

bool is_staged(const fs::path& path, const std::string& name) {
  return path.filename().string().starts_with("." + name + ".");
}

}  // namespace

DirectoryUpdate::DirectoryUpdate(std::string directory, std::string marker, const std::function<void()>& check)
    : directory_(std::move(directory)), marker_(std::move(marker)) {
  std::error_code error;
  for (fs::path path = fs::absolute(directory_, error); !path.empty() && !fs::exists(path, error);
       path = path.parent_path()) {
    made_.push_back(path);
  }
  fs::create_directories(directory_, error);
  TORCH_CHECK(!error, directory_, ": cannot make the directory (", error.message(), ")");
  lock_.emplace(directory_);
  auto undo = c10::make_scope_exit([this] { remove_made(); });
  if (check) {
    check();
  }
  undo.release();
  if (lock_->is_held()) {
    remove_leftovers();
  }
}

std::vector<std::string> DirectoryUpdate::staged_markers(const std::string& directory, const std::string& marker) {
  std::vector<std::string> paths = temporary_files(directory);
  std::erase_if(paths, [&](const std::string& path) { return !is_staged(path, marker); });
  return paths;
}

// The directory's lock says that no living process owns staged files. Files that are being written have their own.
void DirectoryUpdate::remove_leftovers() const {
  for (const std::string& path : temporary_files(directory_)) {
    if (!is_staged(path, marker_)) {
      delete_if_dead(path);
    }
  }
}

void DirectoryUpdate::remove_made() {
  std::error_code ignored;
  for (const fs::path& path : made_) {
    fs::remove(path, ignored);  // an empty one only
  }
}

DirectoryUpdate::~DirectoryUpdate() {
  std::error_code ignored;
  for (const std::string& name : staged_) {
    fs::remove(staged_path(name), ignored);
  }
  remove_made();
}

// Where there are no locks, two processes may save into one directory at once.
std::string DirectoryUpdate::staged_path(const std::string& name) const {
  return path_of("." + name + "." + std::to_string(getpid()) + kTemporaryEnd);
}

std::string DirectoryUpdate::stage(const std::string& name) {
  staged_.push_back(name);
  return staged_path(name);
}

void DirectoryUpdate::stage(const std::string& name, const std::function<void(const std::string&)>& write) {
  const std::string path = stage(name);
  try {
    write(path);
  } catch (const c10::Error& error) {
    std::string message = error.what_without_backtrace();
    const size_t place = message.find(path);
    TORCH_CHECK(false, place == std::string::npos ? message : message.replace(place, path.size(), path_of(name)));
  }
}

void DirectoryUpdate::stage(const std::string& name, std::string_view content) {
  stage(name, [&](const std::string& path) { write_file(path, content); });
}

void DirectoryUpdate::commit(const std::vector<std::string>& obsolete) {
  std::error_code error;
  fs::remove(path_of(marker_), error);
  const auto put_in_place = [&](const std::string& name) {
    fs::rename(staged_path(name), path_of(name), error);
    TORCH_CHECK(!error, path_of(name), ": cannot write (", error.message(), ")");
  };
  for (const std::string& name : staged_) {
    if (name != marker_) {
      put_in_place(name);
    }
  }
  for (const std::string& name : obsolete) {
    fs::remove(path_of(name), error);
  }
  put_in_place(marker_);
  staged_.clear();
  made_.clear();
  if (lock_->is_held()) {
    for (const std::string& path : staged_markers(directory_, marker_)) {
      delete_if_dead(path);
    }
  }
}

bool is_file_there(const std::string& path) {
  std::error_code error;
  return fs::exists(fs::symlink_status(path, error));
}

}  // namespace torchgraft
