#include "support.h"

#include <torchgraft/patch/graph/dump_graph.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace torchgraft {
namespace {

namespace fs = std::filesystem;

// TORCHGRAFT_DUMP is `value` while this lives.
class DumpTo {
 public:
  explicit DumpTo(const std::string& value) { setenv("TORCHGRAFT_DUMP", value.c_str(), /*overwrite=*/1); }
  DumpTo(const DumpTo&) = delete;
  DumpTo& operator=(const DumpTo&) = delete;
  ~DumpTo() { unsetenv("TORCHGRAFT_DUMP"); }
};

fs::path fresh_folder(const std::string& name) {
  const fs::path folder = fs::path(::testing::TempDir()) / name;
  fs::remove_all(folder);
  return folder;
}

std::string read(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(DumpGraph, WritesOneNumberedFileForEachPass) {
  const fs::path folder = fresh_folder("dump_graph");
  const DumpTo variable(folder.string());
  torch::jit::Graph graph;
  graph.addInput("x");
  GraphDump dump("phase");
  dump("first_pass", graph);
  graph.addInput("y");
  dump("second_pass", graph);
  std::vector<fs::path> runs(fs::directory_iterator(folder), {});
  ASSERT_EQ(runs.size(), 1);
  EXPECT_TRUE(runs[0].filename().string().ends_with("_phase"));
  EXPECT_EQ(read(runs[0] / "00_first_pass.txt").find("%y"), std::string::npos);
  EXPECT_NE(read(runs[0] / "01_second_pass.txt").find("%y"), std::string::npos);
}

TEST(DumpGraph, WritesNothingWithoutTheVariable) {
  unsetenv("TORCHGRAFT_DUMP");
  const fs::path before = fs::current_path();
  const fs::path folder = fresh_folder("dump_graph_nothing");
  fs::create_directories(folder);
  fs::current_path(folder);
  GraphDump("phase")("pass", torch::jit::Graph());
  fs::current_path(before);
  EXPECT_TRUE(fs::is_empty(folder));
}

TEST(DumpGraph, NamesTheFileThatCannotBeWritten) {
  const fs::path file = fresh_folder("dump_graph_file");
  std::ofstream(file) << "not a folder";
  const DumpTo variable(file.string());
  GraphDump dump("phase");
  EXPECT_THROW(
      {
        try {
          dump("pass", torch::jit::Graph());
        } catch (const c10::Error& error) {
          EXPECT_NE(error.msg().find("TORCHGRAFT_DUMP: cannot write '" + file.string()), std::string::npos);
          throw;
        }
      },
      c10::Error);
}

}  // namespace
}  // namespace torchgraft
