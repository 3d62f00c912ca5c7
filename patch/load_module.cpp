#include <torchgraft/patch/load_module.h>

#include <torchgraft/registration/error_text.h>
#include <torchgraft/registration/tensor_records.h>

#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/import.h>

#include <array>
#include <exception>
#include <filesystem>
#include <fstream>
#include <new>
#include <optional>
#include <string>

namespace torchgraft {

namespace {

// What a file that is no TorchScript module is, as an end of "it is ..."; empty when that is not known. Reads as little
// as possible.
std::string kind_of_archive(caffe2::serialize::PyTorchStreamReader& file) {
  for (const std::string& name : file.getAllRecords()) {
    if (name.starts_with("data/aotinductor/")) {
      return "an AOTInductor package, which examples/serve_aoti runs";
    }
    if (name.starts_with("models/") || name == "serialized_exported_program.json") {
      return "an exported program of torch.export; torchgraft add makes TorchScript of it, grafted";
    }
  }
  return file.hasRecord("data.pkl") ? "what torch.save() wrote, a state dict or a pickled model; script or trace the "
                                      "model (torch.jit.script, torch.jit.trace) and save that"
                                    : "";
}

std::string kind_of_bytes(const std::string& path) {
  std::array<char, 9> head{};
  std::ifstream file(path, std::ios::binary);
  file.read(head.data(), head.size());
  if (head[0] == '\x80' && head[1] >= 2 && head[1] <= 5) {
    return "what torch.save() of an older release wrote, or another pickle; script or trace the model and save that";
  }
  const bool is_safetensors = file.gcount() == head.size() && head[8] == '{' && head[6] == 0 && head[7] == 0;
  return is_safetensors ? "tensors alone, of safetensors, without the model that uses them" : "";
}

bool is_zip(const std::string& path) {
  std::array<char, 2> head{};
  std::ifstream(path, std::ios::binary).read(head.data(), head.size());
  return head[0] == 'P' && head[1] == 'K';
}

// What torch says of a damaged archive, without its advice to report a bug.
std::string damage(const c10::Error& error) {
  const std::string message = error.what_without_backtrace();
  return message.substr(0, message.find(" This is an internal miniz error"));
}

// Throws c10::Error that says what the file is when it is no TorchScript module.
void check_kind(const std::string& path) {
  constexpr const char* kExpected = ": expected what torch.jit.save() of a scripted or traced model writes, but it is ";
  TORCH_CHECK(std::filesystem::exists(path), path, ": no such file");
  if (!is_zip(path)) {
    const std::string kind = kind_of_bytes(path);
    TORCH_CHECK(false, path, kExpected, kind.empty() ? "of an unknown kind" : kind);
  }
  std::optional<caffe2::serialize::PyTorchStreamReader> file;
  try {
    file.emplace(path);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, path, kExpected, "damaged (", damage(error), ")");
  }
  if (!file->hasRecord("constants.pkl")) {
    const std::string kind = kind_of_archive(*file);
    TORCH_CHECK(kind.empty(), path, kExpected, kind);
  }
}

}  // namespace

torch::jit::Module load_module(const std::string& path) {
  check_kind(path);
  try {
    check_tensor_records(path);
    return torch::jit::load(path, at::kCPU);
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    const std::string message = one_line(error);
    const bool lacks_operator = message.find("Unknown builtin op") != std::string::npos;
    TORCH_CHECK(false, path, ": not a TorchScript file that can be loaded (", message, ")",
                lacks_operator ? "; load the library that has this operator first (--library)" : "");
  }
}

}  // namespace torchgraft
