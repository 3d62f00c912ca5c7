#include "support.h"

#include <torchgraft/patch/adapters/directory_update.h>

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

namespace torchgraft {
namespace {

using testing::error_of;

class Directory : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string name = ::testing::UnitTest::GetInstance()->current_test_info()->name();
    folder_ = std::filesystem::path(::testing::TempDir()) / ("directory_update_" + name);
    std::filesystem::remove_all(folder_);
    DirectoryUpdate update(folder_.string());
    update.stage("config", "old");
    update.stage("weights", "old");
    update.commit("config", {});
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string content(const std::string& name) const {
    std::ostringstream text;
    text << std::ifstream(folder_ / name).rdbuf();
    return text.str();
  }
  size_t files() const { return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(folder_), {})); }

  std::filesystem::path folder_;
};

TEST_F(Directory, StagingWithoutACommitChangesNothing) {
  {
    DirectoryUpdate update(folder_.string());
    update.stage("weights", "new");
    EXPECT_EQ(content("weights"), "old");
    EXPECT_EQ(content("config"), "old");
  }
  EXPECT_EQ(files(), 2u);  // the staged files are gone
}

TEST_F(Directory, ACommitWritesTheStagedFilesAndRemovesTheObsoleteOnes) {
  DirectoryUpdate update(folder_.string());
  update.stage("config", "new");
  update.stage("tensors", "new");
  update.commit("config", {"weights", "never there"});
  EXPECT_EQ(content("config") + content("tensors"), "newnew");
  EXPECT_EQ(files(), 2u);
}

TEST_F(Directory, ACommitThatFailsLeavesNoMixtureThatLoads) {
  std::filesystem::create_directories(folder_ / "tensors" / "in the way");
  {
    DirectoryUpdate update(folder_.string());
    update.stage("config", "new");
    update.stage("tensors", "new");
    const std::string error = error_of([&] { update.commit("config", {"weights"}); });
    EXPECT_NE(error.find("tensors: cannot write"), std::string::npos) << error;
  }
  EXPECT_FALSE(std::filesystem::exists(folder_ / "config"));  // with this file the directory would load
  EXPECT_EQ(content("weights"), "old");
}

TEST_F(Directory, ADirectoryThatCannotBeMadeIsNamed) {
  EXPECT_NE(
      error_of([&] { DirectoryUpdate((folder_ / "config" / "inside").string()); }).find("cannot make the directory"),
      std::string::npos);
}

}  // namespace
}  // namespace torchgraft
