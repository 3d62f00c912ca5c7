// Runs the targets without libFuzzer, which only clang has.
//
//   replay CORPUS                     every file of the corpus, and some changes of each
//   replay CORPUS TARGET SECONDS      changes of the files of one target, for so long
//
// An input that ends the process is left in crash-TARGET in the working directory. To run it again, put it into the
// corpus.

#include "targets.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using torchgraft::fuzz::Target;

constexpr int kChangesOfEach = 200;
constexpr size_t kLongest = 1 << 16;

// For the handler of signals, which may allocate nothing.
const char* current_input = nullptr;
size_t current_size = 0;
std::string crash_path;

void leave_input() {
  const int file = open(crash_path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (file < 0 || write(file, current_input, current_size) != static_cast<ssize_t>(current_size)) {
    constexpr std::string_view kMessage = "replay: the input could not be written\n";
    static_cast<void>(!write(STDERR_FILENO, kMessage.data(), kMessage.size()));
  }
}

extern "C" void on_signal(int signal) {
  leave_input();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void run(Target target, const std::string& bytes) {
  current_input = bytes.data();
  current_size = bytes.size();
  torchgraft::fuzz::run(target, bytes);  // another exception than c10::Error ends the process by SIGABRT
}

std::vector<std::string> files_in(const fs::path& folder) {
  std::vector<fs::path> paths(fs::directory_iterator(folder), fs::directory_iterator{});
  std::sort(paths.begin(), paths.end());
  std::vector<std::string> contents;
  for (const fs::path& path : paths) {
    std::ifstream file(path, std::ios::binary);
    contents.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return contents;
}

class Mutator {
 public:
  explicit Mutator(const std::vector<std::string>& seeds) : seeds_(seeds) {}

  std::string next(std::string bytes) {
    for (size_t changes = 1 + below(4); changes > 0; --changes) {
      change(bytes);
    }
    bytes.resize(std::min(bytes.size(), kLongest));
    return bytes;
  }

  size_t below(size_t limit) { return std::uniform_int_distribution<size_t>(0, limit - 1)(random_); }

 private:
  void change(std::string& bytes) {
    static const std::array<std::string, 14> kPieces = {"-1",
                                                        "1e400",
                                                        "9223372036854775808",
                                                        "null",
                                                        "[",
                                                        "{\"",
                                                        "\"",
                                                        "]}",
                                                        "\xff",
                                                        "\\ud800",
                                                        "0",
                                                        "1e-300",
                                                        std::string(8, '\xff'),
                                                        std::string(8, '\0')};
    const size_t place = below(bytes.size() + 1);
    const size_t count = std::min(bytes.size() - place, 1 + below(16));
    switch (below(6)) {
      case 0:
        bytes.erase(place, count);
        break;
      case 1:
        bytes.insert(place, kPieces.at(below(kPieces.size())));
        break;
      case 2:
        bytes.replace(place, count, kPieces.at(below(kPieces.size())));
        break;
      case 3:
        bytes.insert(place, bytes.substr(place, count));
        break;
      case 4: {
        const std::string& other = seeds_[below(seeds_.size())];
        const size_t from = below(other.size() + 1);
        bytes.insert(place, other.substr(from, 1 + below(64)));
        break;
      }
      default:
        if (count > 0) {
          bytes[place] = static_cast<char>(below(256));
        }
    }
  }

  const std::vector<std::string>& seeds_;
  std::mt19937_64 random_;  // the same changes each time
};

void run_target(const fs::path& corpus, const std::string& name, std::chrono::seconds time) {
  const Target target = torchgraft::fuzz::targets().at(name);
  const std::vector<std::string> seeds = files_in(corpus / name);
  crash_path = "crash-" + name;
  Mutator mutator(seeds);
  size_t runs = 0;
  for (const std::string& seed : seeds) {
    run(target, seed);
    for (int i = 0; i < kChangesOfEach; ++i) {
      run(target, mutator.next(seed));
    }
    runs += 1 + kChangesOfEach;
  }
  for (const auto end = std::chrono::steady_clock::now() + time; std::chrono::steady_clock::now() < end; ++runs) {
    run(target, mutator.next(seeds[mutator.below(seeds.size())]));
  }
  std::cout << name << ": " << runs << " inputs from " << seeds.size() << " files\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 && argc != 4) {
    std::cerr << "replay: expected CORPUS, or CORPUS TARGET SECONDS\n";
    return 2;
  }
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) {
    std::signal(signal, on_signal);
  }
  if (argc == 4) {
    run_target(argv[1], argv[2], std::chrono::seconds(std::atoi(argv[3])));
    return 0;
  }
  for (const auto& [name, target] : torchgraft::fuzz::targets()) {
    run_target(argv[1], name, std::chrono::seconds(0));
  }
}
