#pragma once

#include "request_error.h"

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

constexpr const char* kEnding = "the server is about to end";
constexpr const char* kBusy = "too many requests are waiting, or the server is about to end";

// A thread for slow jobs, such as reading adapters from disk, that must not hold up the others. In order of arrival.
class JobThread {
 public:
  JobThread();
  JobThread(const JobThread&) = delete;
  JobThread& operator=(const JobThread&) = delete;
  ~JobThread();

  // Waits for the running job, drops the others, and accepts no more. One thread may call it.
  void stop();

  bool add(std::function<void()> job);  // false once it is stopped

 private:
  void serve();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;
  bool stopping_ = false;
  std::thread thread_;
};

// The threads for what may wait for files.
class Background {
 public:
  // Waits for what runs, drops what waits, and accepts no more. One thread may call it.
  void stop();

  // Gives the thread that reads adapters a job. Throws RequestError 503 once it is stopped.
  void run(std::function<void()> job);

  // Gives a job to another thread, which waits for no adapter: it looks into the folder.
  void look(std::function<void()> job);

 private:
  JobThread jobs_;
  JobThread looks_;
};
