#pragma once

#include <torchgraft/registration/export.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace torchgraft {

// A regular file, open for reading. Opening it never waits, as it would for a FIFO or a device: whoever can write into
// a folder of adapters could stop the thread that reads them.
class RegularFile {
 public:
  // Throws c10::Error when there is no file, when it is anything but a regular file (or a link to one), or when it has
  // more than `most_bytes`.
  RegularFile(const std::string& path, uint64_t most_bytes);
  RegularFile(const RegularFile&) = delete;
  RegularFile& operator=(const RegularFile&) = delete;
  ~RegularFile();

  // When it was opened.
  uint64_t size() const { return size_; }

  // Reads the next bytes. Throws c10::Error, naming `what`, when the file ends before.
  void read(void* data, size_t bytes, const std::string& what);

 private:
  std::string path_;
  int descriptor_ = -1;
  uint64_t size_ = 0;
};

// The whole content of a regular file.
TORCHGRAFT_PATCH_API std::string read_text(const std::string& path, uint64_t most_bytes);

}  // namespace torchgraft
