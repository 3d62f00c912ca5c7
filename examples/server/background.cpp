#include "background.h"

#include "log.h"

#include <utility>

JobThread::JobThread() : thread_([this] { serve(); }) {}

JobThread::~JobThread() { stop(); }

void JobThread::stop() {
  std::deque<std::function<void()>> dropped;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    dropped.swap(jobs_);
  }
  changed_.notify_all();
  dropped.clear();  // these clients get their answers before the running job ends
  if (thread_.joinable()) {
    thread_.join();
  }
}

bool JobThread::add(std::function<void()> job) {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) {
      return false;
    }
    jobs_.push_back(std::move(job));
  }
  changed_.notify_one();
  return true;
}

void JobThread::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
    if (jobs_.empty()) {
      return;
    }
    std::function<void()> job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    try {
      job();
    } catch (const std::exception& error) {  // out of memory for an answer
      log_line(std::string("server: a request was dropped: ") + error.what());
    }
    job = nullptr;  // before the lock: freeing what it holds may take long
    lock.lock();
  }
}

void Background::stop() {
  looks_.stop();
  jobs_.stop();
}

void Background::run(std::function<void()> job) {
  if (!jobs_.add(std::move(job))) {
    throw RequestError(503, kEnding);
  }
}

void Background::look(std::function<void()> job) {
  if (!looks_.add(std::move(job))) {
    throw RequestError(503, kEnding);
  }
}
