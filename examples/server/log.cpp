#include "log.h"

#include <limits.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <mutex>

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
  text += line;
  text.resize(std::min<size_t>(text.size(), PIPE_BUF - 1));
  text += '\n';
  if (write(STDERR_FILENO, text.data(), text.size()) >= 0) {
    dropped = 0;
  }
}
