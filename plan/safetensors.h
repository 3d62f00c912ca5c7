#pragma once

#include <torchgraft/plan/module_weights.h>
#include <torchgraft/registration/export.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace torchgraft {

// Files of the safetensors format: 8 bytes little-endian length of the header, the header (JSON: name -> {dtype, shape,
// data_offsets}, "__metadata__" -> strings), then the tensors' bytes without gaps. Here each tensor is a CPU tensor
// that owns its memory.

// Reads a whole file. We trust no file: before anything is allocated for tensors, the header is at most 16 MiB (100,000
// tensors) and within the file, every name is new, every dtype known, every shape's bytes equal its offsets, and
// offsets neither overlap, nor leave gaps, nor run over the end. So memory is bounded by the size of the file, which is
// a regular one of at most `most_bytes`, and 20 times the header. Throws c10::Error with the path and what is wrong; no
// part of a bad file is returned.
constexpr uint64_t kMostWeightBytes = uint64_t{4} << 30;
TORCHGRAFT_PATCH_API StateDict read_safetensors(const std::string& path, uint64_t most_bytes = kMostWeightBytes);

// Writes a TemporaryFile: `path` holds its old content or all of the new. Tensors are written one by one, sorted by
// name, whatever memory they share. Throws c10::Error when a dtype has no name in the format, or the file cannot be
// written.
TORCHGRAFT_PATCH_API void write_safetensors(const StateDict& tensors, const std::string& path,
                                            const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

// The same for any content.
TORCHGRAFT_PATCH_API void write_file(const std::string& path, std::string_view content);

}  // namespace torchgraft
