#include <torchgraft/patch/graph/dump_graph.h>

#include <c10/util/Exception.h>
#include <c10/util/error.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace torchgraft {
namespace {

std::string numbered(int number, const std::string& name) {
  const std::string digits = std::to_string(number);
  return (digits.size() < 2 ? "0" : "") + digits + "_" + name;
}

}  // namespace

GraphDump::GraphDump(const std::string& phase) {
  static std::atomic<int> runs = 0;
  const char* folder = std::getenv("TORCHGRAFT_DUMP");
  if (folder && *folder) {
    folder_ = (std::filesystem::path(folder) / numbered(runs++, phase)).string();
  }
}

void GraphDump::operator()(const std::string& pass, const torch::jit::Graph& graph) {
  if (folder_.empty()) {
    return;
  }
  const std::filesystem::path path = std::filesystem::path(folder_) / (numbered(step_++, pass) + ".txt");
  std::error_code failure;
  std::filesystem::create_directories(folder_, failure);
  errno = 0;
  std::ofstream file(path);
  file << graph.toString();
  file.close();
  const std::string why = failure ? failure.message() : c10::utils::str_error(errno);
  TORCH_CHECK(!failure && file, "TORCHGRAFT_DUMP: cannot write '", path.string(), "' (", why,
              "); name another folder (inspect --dump, or the variable), or write no graphs");
}

}  // namespace torchgraft
