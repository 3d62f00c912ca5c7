#include "log.h"

#include <limits.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <mutex>

namespace {

// Names and texts of strangers' files may hold what a terminal takes for a command: bytes below the space, and in UTF-8
// U+0080 to U+009F.
std::string printable(std::string text) {
  const auto byte = [&](size_t place) { return place < text.size() ? static_cast<unsigned char>(text[place]) : 0; };
  for (size_t i = 0; i < text.size(); ++i) {
    if (byte(i) == 0xc2 && (byte(i + 1) & 0xe0) == 0x80) {
      text.replace(i, 2, "??");
    } else if (byte(i) < ' ' || byte(i) == 0x7f) {
      text[i] = '?';
    }
  }
  return text;
}

}  // namespace

void log_line(const std::string& line) {
  static std::mutex mutex;
  static size_t dropped = 0;
  const std::lock_guard lock(mutex);
  pollfd target = {STDERR_FILENO, POLLOUT, 0};
  if (poll(&target, 1, 0) <= 0) {  // a pipe that is ready takes PIPE_BUF bytes at once
    ++dropped;
    return;
  }
  std::string text = dropped > 0 ? "server: " + std::to_string(dropped) + " lines before this one are missing\n" : "";
  text += printable(line);
  text.resize(std::min<size_t>(text.size(), PIPE_BUF - 1));
  text += '\n';
  if (write(STDERR_FILENO, text.data(), text.size()) >= 0) {
    dropped = 0;
  }
}
