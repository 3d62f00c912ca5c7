#include "progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace {

constexpr int kWidth = 30;  // characters of the bar
constexpr std::chrono::milliseconds kRedraw(100);
constexpr std::chrono::seconds kNextLine(10);

std::string clock_text(double seconds) {
  const auto whole = static_cast<long>(seconds + 0.5);
  char text[48];
  if (whole < 3600) {
    std::snprintf(text, sizeof(text), "%ld:%02ld", whole / 60, whole % 60);
  } else {
    std::snprintf(text, sizeof(text), "%ld:%02ld:%02ld", whole / 3600, whole / 60 % 60, whole % 60);
  }
  return text;
}

}  // namespace

Progress::Progress(int64_t done, int64_t total) : terminal_(isatty(STDERR_FILENO) == 1), first_(done), total_(total) {}

Progress::~Progress() { wipe(); }

std::string Progress::line(int64_t done, int64_t epoch, double loss) const {
  const double elapsed = std::chrono::duration<double>(Clock::now() - start_).count();
  const double left =
      elapsed / static_cast<double>(std::max<int64_t>(1, done - first_)) * static_cast<double>(total_ - done);
  std::string bar;
  if (terminal_) {
    const auto filled = static_cast<size_t>(kWidth * done / std::max<int64_t>(1, total_));
    bar.append("[").append(filled, '#').append(kWidth - filled, '.').append("] ");
  }
  char text[160];
  std::snprintf(text, sizeof(text), "step %lld/%lld  epoch %lld  loss %.4f  ETA %s", static_cast<long long>(done),
                static_cast<long long>(total_), static_cast<long long>(epoch), loss, clock_text(left).c_str());
  return bar + text;
}

void Progress::update(int64_t done, int64_t epoch, double loss) {
  const auto now = Clock::now();
  if (now - shown_ < (terminal_ ? Clock::duration(kRedraw) : Clock::duration(kNextLine))) {
    return;
  }
  shown_ = now;
  const std::string text = line(done, epoch, loss);
  if (terminal_) {
    std::fprintf(stderr, "\r\x1b[K%s", text.c_str());  // to the line's start, and erase it
    std::fflush(stderr);
    drawn_ = true;
  } else {
    std::fprintf(stderr, "%s\n", text.c_str());
  }
}

void Progress::note(const std::string& text) {
  wipe();
  std::fprintf(stderr, "%s\n", text.c_str());
}

void Progress::wipe() {
  if (drawn_) {
    std::fprintf(stderr, "\r\x1b[K");
    drawn_ = false;
  }
}
