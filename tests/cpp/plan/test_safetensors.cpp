#include "support.h"

#include <torchgraft/plan/check_safetensors.h>
#include <torchgraft/plan/safetensors.h>
#include <torchgraft/plan/temporary_file.h>

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include <filesystem>
#include <fstream>

namespace torchgraft {
namespace {

using testing::error_of;

class Safetensors : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::path(::testing::TempDir()) /
              (std::string("safetensors_") + ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string path() const { return (folder_ / "a.safetensors").string(); }

  size_t files() const { return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(folder_), {})); }

  std::filesystem::path folder_;
};

TEST_F(Safetensors, WhatIsWrittenIsRead) {
  const at::Tensor base = at::arange(12, at::kFloat).view({3, 4});
  const StateDict tensors = {{"transposed", base.t()},         {"scalar", at::scalar_tensor(2.5, at::kDouble)},
                             {"empty", at::empty({0, 3})},     {"half", base.to(at::kHalf)},
                             {"shared", base.narrow(0, 1, 2)}, {"flags", base.gt(3)}};
  write_safetensors(tensors, path());
  const StateDict found = read_safetensors(path());
  ASSERT_EQ(found.size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    EXPECT_TRUE(found.at(name).scalar_type() == tensor.scalar_type() && at::equal(found.at(name), tensor)) << name;
  }
  EXPECT_EQ(files(), 1u);
}

TEST_F(Safetensors, EveryTruncationIsRefused) {
  write_safetensors({{"a", at::ones({5})}, {"b", at::ones({2, 2})}}, path());
  const auto size = std::filesystem::file_size(path());
  for (uintmax_t length = 0; length < size; ++length) {
    std::filesystem::resize_file(path(), length);
    const std::string fault = error_of([&] { read_safetensors(path()); });
    EXPECT_NE(fault, "") << length << " of " << size << " bytes";
    EXPECT_EQ(error_of([&] { check_safetensors(path(), kMostWeightBytes); }), fault);
    write_safetensors({{"a", at::ones({5})}, {"b", at::ones({2, 2})}}, path());
  }
}

TEST_F(Safetensors, EveryChangedByteOfTheHeaderIsRefusedOrHarmless) {
  write_safetensors({{"a", at::ones({5})}, {"b", at::ones({2, 2})}}, path());
  std::ifstream in(path(), std::ios::binary);
  const std::string content((std::istreambuf_iterator<char>(in)), {});
  for (size_t i = 0; i + 36 < content.size(); ++i) {
    for (const char byte : {'\0', '9', '"', '{', '\xff'}) {
      std::string changed = content;
      changed[i] = byte;
      std::ofstream(path(), std::ios::binary) << changed;
      try {
        for (const auto& [name, tensor] : read_safetensors(path())) {
          EXPECT_LE(tensor.nbytes(), content.size());
        }
      } catch (const c10::Error& error) {
        EXPECT_NE(std::string(error.what_without_backtrace()).find(path()), std::string::npos);
      }
    }
  }
}

// The alarm ends the test's process if reading waits.
TEST_F(Safetensors, OnlyRegularFilesAreRead) {
  alarm(60);
  ASSERT_EQ(mkfifo(path().c_str(), 0600), 0);
  EXPECT_NE(error_of([&] { read_safetensors(path()); }).find(path() + ": expected a regular file, got a FIFO"),
            std::string::npos);
  EXPECT_NE(error_of([&] { read_safetensors(folder_.string()); }).find("got a directory"), std::string::npos);
  EXPECT_NE(error_of([&] { read_safetensors("/dev/zero"); }).find("got a device"), std::string::npos);
  const std::string loop = (folder_ / "loop").string();
  std::filesystem::create_symlink(loop, loop);
  EXPECT_NE(error_of([&] { read_safetensors(loop); }).find(loop + ": cannot read ("), std::string::npos);
  alarm(0);
}

// Parsed, a header takes many times its size.
TEST_F(Safetensors, AHeaderThatNoRealFileHasIsNotParsed) {
  constexpr uint64_t kLength = (uint64_t{16} << 20) + 1;
  std::ofstream file(path(), std::ios::binary);
  file.write(reinterpret_cast<const char*>(&kLength), sizeof(kLength)) << "{}" << std::string(kLength - 2, ' ');
  file.close();
  EXPECT_NE(
      error_of([&] { read_safetensors(path()); }).find("its header has 16777217 bytes, expected at most 16777216"),
      std::string::npos);
}

TEST_F(Safetensors, AFileThatIsTooLargeIsNotRead) {
  write_safetensors({{"a", at::ones({5})}}, path());
  const auto size = std::filesystem::file_size(path());
  EXPECT_EQ(read_safetensors(path(), size).size(), 1u);
  EXPECT_NE(error_of([&] { read_safetensors(path(), size - 1); }).find("expected a file of at most"),
            std::string::npos);
  std::filesystem::resize_file(path(), kMostWeightBytes + 1);
  EXPECT_NE(error_of([&] { read_safetensors(path()); }).find("expected a file of at most 4294967296 bytes"),
            std::string::npos);
}

// A process that is killed at the end of `write`.
template <typename Write>
void die_in(Write write) {
  const pid_t child = fork();
  if (child == 0) {
    write();
    raise(SIGKILL);
  }
  waitpid(child, nullptr, 0);
}

TEST_F(Safetensors, WhatAKilledWriterLeftIsDeletedByTheNextOne) {
  die_in([&] {
    TemporaryFile file(path());
    file.write("half", 4);
    // As it is between the change of its permissions and its renaming.
    const auto made = std::filesystem::directory_iterator(folder_)->path();
    std::filesystem::permissions(made, std::filesystem::perms(0644));
    raise(SIGKILL);
  });
  EXPECT_EQ(files(), 1u);
  for (const char* name :
       {"a.safetensors.backup.tmp", ".a.safetensors.1.new", ".b.safetensors.abcdef.torchgraft-tmp"}) {
    std::ofstream(folder_ / name) << "the user's";
  }
  EXPECT_EQ(files(), 4u);
  TemporaryFile alive(path());
  EXPECT_EQ(files(), 4u);
  write_file(path(), "new");
  EXPECT_EQ(files(), 5u);  // the user's, that of the living writer, and what was written
  alive.write("last", 4);
  alive.keep();
  EXPECT_EQ(std::filesystem::file_size(path()), 4u);
  die_in([&] {
    TemporaryFile file(path());
    raise(SIGKILL);
  });
  EXPECT_EQ(files(), 5u);
  remove_leftovers(path());
  EXPECT_EQ(files(), 4u);
}

TEST_F(Safetensors, APermissionStaysAndTheUmaskHoldsForNewFiles) {
  const auto mode = [&] { return std::filesystem::status(path()).permissions(); };
  const mode_t before = umask(027);
  write_file(path(), "new");
  EXPECT_EQ(mode(), std::filesystem::perms(0640));
  std::filesystem::permissions(path(), std::filesystem::perms(0606));
  write_file(path(), "other");
  EXPECT_EQ(mode(), std::filesystem::perms(0606));
  umask(before);
}

TEST_F(Safetensors, WhatCannotBeWrittenLeavesNothing) {
  EXPECT_NE(error_of([&] { write_safetensors({{"c", at::ones({2}, at::kComplexFloat)}}, path()); }).find("no dtype"),
            std::string::npos);
  EXPECT_EQ(files(), 0u);
  EXPECT_NE(error_of([&] { write_safetensors({}, (folder_ / "no" / "where").string()); }).find("cannot write"),
            std::string::npos);
}

}  // namespace
}  // namespace torchgraft
