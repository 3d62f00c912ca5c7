#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

// A Prometheus histogram. Any thread may observe.
class Histogram {
 public:
  explicit Histogram(std::vector<double> bounds);  // upper ends, ascending
  void observe(double value);
  std::string text(const std::string& name, const std::string& help) const;

 private:
  const std::vector<double> bounds_;
  mutable std::mutex mutex_;
  std::vector<uint64_t> counts_;  // one more than bounds_: +Inf
  double sum_ = 0.0;
};

// Counts by the value of one label.
class Counter {
 public:
  void add(const std::string& label, uint64_t count = 1);
  std::string text(const std::string& name, const std::string& label, const std::string& help) const;

 private:
  mutable std::mutex mutex_;
  std::map<std::string, uint64_t> counts_;
};

// One number as Prometheus reads it; type: "gauge" or "counter".
std::string metric_text(const std::string& name, const std::string& type, const std::string& help, double value);

// Bytes of memory that the process has in RAM.
int64_t resident_memory();

struct Metrics {
  Histogram seconds{{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10}};
  Histogram batch_rows{{1, 2, 4, 8, 16, 32, 64, 128, 256}};
  Counter responses;         // by status
  Counter adapter_requests;  // by adapter, of names that are served only; "" is the base
  Histogram generate_seconds{{0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100}};
  Counter sequences;  // by how they ended
  std::atomic<uint64_t> prompt_tokens{0};
  std::atomic<uint64_t> generated_tokens{0};
};
