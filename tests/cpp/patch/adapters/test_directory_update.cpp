#include "support.h"

#include <torchgraft/patch/adapters/directory_lock.h>
#include <torchgraft/patch/adapters/directory_update.h>
#include <torchgraft/patch/adapters/one_version.h>
#include <torchgraft/plan/regular_file.h>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

std::atomic<int> locks_refused = -1;  // counts, from 0 on, in a file system without locks
std::atomic<int> renames_left = -1;   // before the one at which the process is killed; below 0: none

}  // namespace

// In place of the C library's.
extern "C" int flock(int descriptor, int operation) noexcept {
  if (locks_refused < 0) {
    return static_cast<int>(syscall(SYS_flock, descriptor, operation));
  }
  ++locks_refused;
  errno = ENOLCK;
  return -1;
}

// Visible to std::filesystem, too.
extern "C" __attribute__((visibility("default"))) int rename(const char* from, const char* to) noexcept {
  if (renames_left-- == 0) {
    raise(SIGKILL);
  }
  return static_cast<int>(syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}

namespace torchgraft {
namespace {

using testing::error_of;

class Directory : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string name = ::testing::UnitTest::GetInstance()->current_test_info()->name();
    folder_ = std::filesystem::path(::testing::TempDir()) / ("directory_update_" + name);
    std::filesystem::remove_all(folder_);
    DirectoryUpdate update(folder_.string(), "config");
    update.stage("config", "old");
    update.stage("weights", "old");
    update.commit({});
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
    DirectoryUpdate update(folder_.string(), "config");
    update.stage("weights", "new");
    EXPECT_EQ(content("weights"), "old");
    EXPECT_EQ(content("config"), "old");
  }
  EXPECT_EQ(files(), 2u);  // the staged files are gone
}

TEST_F(Directory, ACommitWritesTheStagedFilesAndRemovesTheObsoleteOnes) {
  DirectoryUpdate update(folder_.string(), "config");
  update.stage("config", "new");
  update.stage("tensors", "new");
  update.commit({"weights", "never there"});
  EXPECT_EQ(content("config") + content("tensors"), "newnew");
  EXPECT_EQ(files(), 2u);
}

TEST_F(Directory, ACommitThatFailsLeavesNoMixtureThatLoads) {
  std::filesystem::create_directories(folder_ / "tensors" / "in the way");
  {
    DirectoryUpdate update(folder_.string(), "config");
    update.stage("config", "new");
    update.stage("tensors", "new");
    const std::string error = error_of([&] { update.commit({"weights"}); });
    EXPECT_NE(error.find("tensors: cannot write"), std::string::npos) << error;
  }
  EXPECT_FALSE(std::filesystem::exists(folder_ / "config"));  // with this file the directory would load
  EXPECT_EQ(content("weights"), "old");
}

TEST_F(Directory, WhatAKilledProcessLeftIsRemovedByTheNextUpdate) {
  const pid_t child = fork();
  if (child == 0) {
    DirectoryUpdate update(folder_.string(), "config");
    update.stage("weights", "new");
    raise(SIGKILL);
  }
  waitpid(child, nullptr, 0);
  std::ofstream(folder_ / "..weights.123.torchgraft-tmp.a1B2c3.torchgraft-tmp") << "half";
  const std::vector<std::string> users = {".notes.1.new", ".weights.123.new.a1B2c3.tmp", "the user's.new"};
  for (const std::string& name : users) {
    std::ofstream(folder_ / name) << "whole";
  }
  EXPECT_EQ(files(), 7u);
  {
    DirectoryUpdate update(folder_.string(), "config");
    EXPECT_EQ(files(), 5u);
  }
  EXPECT_EQ(content("weights"), "old");
  for (const std::string& name : users) {
    EXPECT_EQ(content(name), "whole");
  }
}

// Until the next update has one of its own in place: it says whose the other files are.
TEST_F(Directory, TheMarkerOfAKilledProcessStaysUntilThereIsANewOne) {
  const pid_t child = fork();
  if (child == 0) {
    DirectoryUpdate update(folder_.string(), "config");
    update.stage("config", "killed");
    raise(SIGKILL);
  }
  waitpid(child, nullptr, 0);
  const auto staged = [&] { return DirectoryUpdate::staged_markers(folder_.string(), "config").size(); };
  {
    DirectoryUpdate update(folder_.string(), "config");
    update.stage("config", "not committed");
    EXPECT_EQ(staged(), 2u);
  }
  EXPECT_EQ(staged(), 1u);
  DirectoryUpdate update(folder_.string(), "config");
  update.stage("config", "new");
  update.commit({});
  EXPECT_EQ(staged(), 0u);
  EXPECT_EQ(content("config"), "new");
}

// Each killed update leaves the old files, the new ones, or no marker in place and one that says whose they are.
TEST_F(Directory, KilledAtAnyRenameItLeavesNoMixtureAndNothingOfNobody) {
  const auto update_to = [&](const std::string& version) {
    DirectoryUpdate update(folder_.string(), "config");
    for (const char* name : {"weights", "head", "config"}) {
      update.stage(name, version);
    }
    update.commit({});
  };
  update_to("old");
  int missing = 0;
  int killed_at = 0;
  for (bool was_killed = true; was_killed; ++killed_at) {
    const pid_t child = fork();
    if (child == 0) {
      renames_left = killed_at;
      update_to("new");
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    was_killed = WIFSIGNALED(status);
    if (std::filesystem::exists(folder_ / "config")) {
      EXPECT_EQ(content("weights") + content("head"), content("config") + content("config")) << killed_at;
    } else {
      ++missing;
      EXPECT_GE(DirectoryUpdate::staged_markers(folder_.string(), "config").size(), 1u) << killed_at;
    }
    if (was_killed && killed_at % 2 == 0) {  // the next one finds what one or two killed ones left
      update_to("old");
      EXPECT_EQ(files(), 3u) << killed_at;
    }
  }
  EXPECT_EQ(killed_at, 7);  // three files are written under other names, and three renamed
  EXPECT_EQ(missing, 3);
}

TEST_F(Directory, WhatTheCheckRefusesStaysAsItIs) {
  std::ofstream(folder_ / ".weights.123.torchgraft-tmp") << "half";
  const auto refuse = [] { TORCH_CHECK(false, "not yours"); };
  const std::string nested = (folder_ / "a" / "b").string();
  for (const std::string& directory : {folder_.string(), nested}) {
    EXPECT_EQ(error_of([&] { const DirectoryUpdate update(directory, "config", refuse); }), "not yours");
  }
  EXPECT_EQ(files(), 3u);  // nothing made, nothing removed
  EXPECT_EQ(content("config"), "old");
}

TEST_F(Directory, TwoUpdatesTakeTurns) {
  std::optional<DirectoryUpdate> first(std::in_place, folder_.string(), "config");
  first->stage("weights", "first");
  std::atomic<bool> is_open = false;
  std::thread other([&] {
    DirectoryUpdate second(folder_.string(), "config");
    is_open = true;
    second.stage("config", "second");
    second.commit({});
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_FALSE(is_open);
  first->stage("config", "first");
  first->commit({});  // what it has staged is still there
  first.reset();
  other.join();
  EXPECT_EQ(content("weights") + content("config"), "firstsecond");
}

// Writers replace both files all the time. Either file alone is always whole; that both are of one update is what
// read_one_version adds.
TEST_F(Directory, AReaderGetsOneVersion) {
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    for (int turn = 0; !stop; ++turn) {
      DirectoryUpdate update(folder_.string(), "config");
      update.stage("weights", std::to_string(turn));
      update.stage("config", std::to_string(turn));
      update.commit({});
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  });
  for (int reads = 0; reads < 40; ++reads) {
    std::string config;
    std::string weights;
    read_one_version(folder_.string(), {"config", "weights"}, "config", [&] {
      config = read_text((folder_ / "config").string(), 100);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      weights = read_text((folder_ / "weights").string(), 100);
    });
    EXPECT_EQ(config, weights);
  }
  stop = true;
  writer.join();
}

TEST_F(Directory, ItsMarkerIsThereWhileUpdatesExchangeIt) {
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    for (int turn = 0; turn < 300; ++turn) {
      DirectoryUpdate update(folder_.string(), "config");
      update.stage("weights", std::to_string(turn));
      update.stage("config", std::to_string(turn));
      update.commit({});
    }
    stop = true;
  });
  int missing = 0;
  while (!stop) {
    missing += has_marker(folder_.string(), "config") ? 0 : 1;
  }
  writer.join();
  EXPECT_EQ(missing, 0);
}

TEST_F(Directory, AMarkerThatIsMissingIsNotWaitedForForEver) {
  EXPECT_FALSE(has_marker(folder_.string(), "other"));
  EXPECT_FALSE(has_marker((folder_ / "nowhere").string(), "config"));
  EXPECT_FALSE(has_marker((folder_ / "weights").string(), "config"));
  std::filesystem::create_directory(folder_ / "folder");
  EXPECT_FALSE(has_marker(folder_.string(), "folder"));
  DirectoryUpdate update(folder_.string(), "config");
  EXPECT_FALSE(has_marker(folder_.string(), "other"));
}

TEST_F(Directory, NobodyWaitsWhereThereAreNoLocks) {
  locks_refused = 0;
  EXPECT_FALSE(has_marker(folder_.string(), "other"));
  EXPECT_EQ(locks_refused.exchange(-1), 1);
}

TEST_F(Directory, LooksAreTakenBetweenUpdatesOnly) {
  int looks = 0;
  const auto look = [&] { ++looks; };
  EXPECT_EQ(look_between_updates(folder_.string(), look), Look::kDone);
  EXPECT_EQ(look_between_updates((folder_ / "nowhere").string(), look), Look::kWithoutLocks);
  const DirectoryUpdate update(folder_.string(), "config");
  EXPECT_EQ(look_between_updates(folder_.string(), look), Look::kLocked);
  EXPECT_EQ(looks, 1);
}

TEST_F(Directory, AReaderOfADamagedDirectoryIsToldAtOnce) {
  int reads = 0;
  const auto read = [&] {
    ++reads;
    TORCH_CHECK(false, "damaged");
  };
  EXPECT_EQ(error_of([&] { read_one_version(folder_.string(), {"config"}, "config", read); }), "damaged");
  std::filesystem::remove(folder_ / "config");
  EXPECT_EQ(error_of([&] { read_one_version(folder_.string(), {"config"}, "config", read); }), "damaged");
  EXPECT_EQ(reads, 2);
}

TEST_F(Directory, ADirectoryThatCannotBeMadeIsNamed) {
  EXPECT_NE(error_of([&] {
              DirectoryUpdate((folder_ / "config" / "inside").string(), "config");
            }).find("cannot make the directory"),
            std::string::npos);
}

}  // namespace
}  // namespace torchgraft
