#include "metrics.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <iomanip>
#include <sstream>

namespace {

std::string heading(const std::string& name, const std::string& type, const std::string& help) {
  return "# HELP " + name + " " + help + "\n# TYPE " + name + " " + type + "\n";
}

}  // namespace

Histogram::Histogram(std::vector<double> bounds) : bounds_(std::move(bounds)), counts_(bounds_.size() + 1) {}

void Histogram::observe(double value) {
  const auto bucket = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  const std::lock_guard lock(mutex_);
  ++counts_[static_cast<size_t>(bucket)];
  sum_ += value;
}

std::string Histogram::text(const std::string& name, const std::string& help) const {
  const std::lock_guard lock(mutex_);
  std::ostringstream out;
  out << heading(name, "histogram", help);
  uint64_t below = 0;
  for (size_t i = 0; i < counts_.size(); ++i) {
    below += counts_[i];
    out << name << "_bucket{le=\"";
    i < bounds_.size() ? out << bounds_[i] : out << "+Inf";
    out << "\"} " << below << "\n";
  }
  out << name << "_sum " << std::setprecision(17) << sum_ << "\n" << name << "_count " << below << "\n";
  return out.str();
}

void Counter::add(const std::string& label, uint64_t count) {
  const std::lock_guard lock(mutex_);
  counts_[label] += count;
}

std::string Counter::text(const std::string& name, const std::string& label, const std::string& help) const {
  const std::lock_guard lock(mutex_);
  std::ostringstream out;
  out << heading(name, "counter", help);
  for (const auto& [value, count] : counts_) {
    out << name << "{" << label << "=\"" << value << "\"} " << count << "\n";
  }
  return out.str();
}

std::string metric_text(const std::string& name, const std::string& type, const std::string& help, double value) {
  std::ostringstream out;
  out.precision(15);
  out << heading(name, type, help) << name << " " << value << "\n";
  return out.str();
}

int64_t resident_memory() {
  std::ifstream file("/proc/self/statm");
  int64_t size = 0;
  int64_t resident = 0;
  file >> size >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}
