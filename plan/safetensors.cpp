#include <torchgraft/plan/safetensors.h>

#include <torchgraft/plan/check_safetensors.h>
#include <torchgraft/plan/regular_file.h>
#include <torchgraft/plan/temporary_file.h>
#include <torchgraft/registration/parse_json.h>

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <functional>
#include <optional>
#include <set>
#include <vector>

namespace torchgraft {
namespace {

using Json = nlohmann::json;

// An entry of a header has some 100 bytes: this is room for 100,000 tensors, and parsed it takes about 20 times as much
// memory.
constexpr uint64_t kLongestHeader = uint64_t{16} << 20;
constexpr int kDeepestHeader = 8;  // name -> entry -> list

const std::map<std::string, at::ScalarType>& dtypes() {
  static const std::map<std::string, at::ScalarType> kDtypes = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16}, {"I64", at::kLong},
      {"I32", at::kInt},    {"I16", at::kShort}, {"I8", at::kChar},  {"U8", at::kByte},       {"BOOL", at::kBool}};
  return kDtypes;
}

// What the header says about one tensor.
struct Entry {
  std::string name;
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape;
  uint64_t begin = 0;
  uint64_t end = 0;
};

// Parses the header, and refuses repeated names on the way, not afterwards.
Json parse_header(const std::string& path, const std::string& text) {
  std::vector<std::set<std::string>> keys;
  std::string fault;
  const auto watch = [&](int /*depth*/, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) {
      keys.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      keys.pop_back();
    } else if (event == Json::parse_event_t::key && !keys.back().insert(parsed.get<std::string>()).second) {
      fault = "its header has the name " + shown_json(parsed) + " twice";
    }
    return true;
  };
  const Json json = parse_json(text, path + ": its header", kDeepestHeader, watch);
  TORCH_CHECK(fault.empty(), path, ": ", fault);
  TORCH_CHECK(json.is_object(), path, ": its header is not a JSON object");
  return json;
}

Entry parse_entry(const std::string& path, const std::string& name, const Json& json, uint64_t data_size) {
  const auto check = [&](bool holds, const std::string& what) {
    TORCH_CHECK(holds, path, ": tensor '", name, "': ", what);
  };
  check(json.is_object() && json.contains("dtype") && json.contains("shape") && json.contains("data_offsets"),
        "expected dtype, shape and data_offsets");
  Entry entry;
  entry.name = name;
  const Json& dtype = json.at("dtype");
  const auto known = dtype.is_string() ? dtypes().find(dtype.get<std::string>()) : dtypes().end();
  check(known != dtypes().end(), "the dtype " + shown_json(dtype) + " is not known");
  entry.dtype = known->second;
  check(json.at("shape").is_array() && json.at("shape").size() <= 64, "expected shape to be a list of sizes");
  uint64_t bytes = c10::elementSize(entry.dtype);
  bool overflow = false;
  for (const Json& size : json.at("shape")) {
    check(size.is_number_unsigned() && size.get<uint64_t>() <= INT64_MAX, "expected sizes of at least 0");
    overflow = __builtin_mul_overflow(bytes, size.get<uint64_t>(), &bytes) || overflow;
    entry.shape.push_back(static_cast<int64_t>(size.get<uint64_t>()));
  }
  const Json& offsets = json.at("data_offsets");
  check(offsets.is_array() && offsets.size() == 2 && offsets[0].is_number_unsigned() && offsets[1].is_number_unsigned(),
        "expected data_offsets to be [begin, end]");
  entry.begin = offsets[0].get<uint64_t>();
  entry.end = offsets[1].get<uint64_t>();
  check(entry.begin <= entry.end && entry.end <= data_size,
        c10::str("its data_offsets [", entry.begin, ", ", entry.end, "] are outside of the file's ", data_size,
                 " bytes of data (is the file truncated?)"));
  check(!overflow && entry.end - entry.begin == bytes,
        c10::str("its shape and dtype need ", overflow ? "too many" : std::to_string(bytes),
                 " bytes, its data_offsets give ", entry.end - entry.begin));
  return entry;
}

// The entries, sorted by their data, which they cover without overlap or gap.
std::vector<Entry> parse_entries(const std::string& path, const Json& header, uint64_t data_size) {
  std::vector<Entry> entries;
  for (const auto& [name, json] : header.items()) {
    check_text(name, path + ": its header");
    if (name != "__metadata__") {
      entries.push_back(parse_entry(path, name, json, data_size));
    }
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  uint64_t reached = 0;
  for (const Entry& entry : entries) {
    TORCH_CHECK(entry.begin == reached, path, ": tensor '", entry.name, "': its data begins at ", entry.begin,
                entry.begin < reached ? ", inside another's, which ends at " : ", after a gap from ", reached);
    reached = entry.end;
  }
  TORCH_CHECK(reached == data_size, path, ": ", data_size - reached, " bytes after its last tensor belong to none");
  return entries;
}

std::string dtype_name(const std::string& path, const std::string& tensor, at::ScalarType dtype) {
  for (const auto& [name, known] : dtypes()) {
    if (known == dtype) {
      return name;
    }
  }
  TORCH_CHECK(false, path, ": tensor '", tensor, "': safetensors has no dtype ", dtype);
}

// Reads up to the end of the header, and checks it against the file's size.
std::vector<Entry> read_entries(RegularFile& file, const std::string& path) {
  const uint64_t size = file.size();
  TORCH_CHECK(size >= 8, path, ": not a safetensors file, it has ", size, " bytes");
  uint8_t prefix[8];
  file.read(prefix, sizeof(prefix), "its header");
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) {
    length = length << 8 | prefix[i];
  }
  TORCH_CHECK(length <= size - 8, path, ": its header claims ", length, " bytes, the file has ", size - 8,
              " after the length; it is truncated or no safetensors file");
  TORCH_CHECK(length <= kLongestHeader, path, ": its header has ", length, " bytes, expected at most ", kLongestHeader);
  std::string text(length, '\0');
  file.read(text.data(), length, "its header");
  return parse_entries(path, parse_header(path, text), size - 8 - length);
}

}  // namespace

void check_safetensors(const std::string& path, uint64_t most_bytes) {
  RegularFile file(path, most_bytes);
  read_entries(file, path);
}

StateDict read_safetensors(const std::string& path, uint64_t most_bytes) {
  RegularFile file(path, most_bytes);
  StateDict result;
  for (const Entry& entry : read_entries(file, path)) {
    at::Tensor tensor = at::empty(entry.shape, at::TensorOptions().dtype(entry.dtype));
    file.read(tensor.data_ptr(), entry.end - entry.begin, "tensor '" + entry.name + "'");
    result.emplace(entry.name, std::move(tensor));
  }
  return result;
}

void write_safetensors(const StateDict& tensors, const std::string& path,
                       const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) {
    header["__metadata__"] = metadata;
  }
  uint64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    const uint64_t bytes = static_cast<uint64_t>(tensor.numel()) * tensor.element_size();
    header[name] = {{"dtype", dtype_name(path, name, tensor.scalar_type())},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the data begins at a multiple of 8
  std::string prefix;
  for (int i = 0; i < 8; ++i) {
    prefix += static_cast<char>(static_cast<uint64_t>(text.size()) >> (8 * i) & 0xFF);
  }
  TemporaryFile file(path);
  file.write(prefix.data(), prefix.size());
  file.write(text.data(), text.size());
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor bytes = tensor.detach().to(at::kCPU).contiguous();
    file.write(bytes.data_ptr(), bytes.nbytes());
  }
  file.keep();
}

void write_file(const std::string& path, std::string_view content) {
  TemporaryFile file(path);
  file.write(content.data(), content.size());
  file.keep();
}

}  // namespace torchgraft
