#pragma once

#include <chrono>
#include <cstdint>
#include <string>

// How far a run is, on stderr: on a terminal one line that it draws again and again, else a line every ten seconds.
// (Debian has no progress bar library for C++.)
class Progress {
 public:
  // An earlier process did `done` steps of `total`: they do not count for the speed.
  Progress(int64_t done, int64_t total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(int64_t done, int64_t epoch, double loss);

  // A line of text that stays.
  void note(const std::string& text);

 private:
  using Clock = std::chrono::steady_clock;

  std::string line(int64_t done, int64_t epoch, double loss) const;
  void wipe();

  const bool terminal_;
  const int64_t first_;
  const int64_t total_;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point shown_ = start_;
  bool drawn_ = false;
};
