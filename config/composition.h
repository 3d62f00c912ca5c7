#pragma once

#include <torchgraft/registration/export.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

// Compositions of adapters, as the adapters library has them (adapters/composition.py).
namespace torchgraft {

// kAdapter is a leaf: one adapter.
enum class BlockKind { kAdapter, kStack, kFuse, kSplit, kBatchSplit, kParallel, kMultiTask, kAverage };

// A tree of blocks whose leaves are adapters: Stack(en, Average(a, b)).
struct Composition {
  BlockKind kind = BlockKind::kAdapter;
  std::string name = {};                   // of a leaf: its adapter; of a Fuse: its AdapterFusion layer, if it is named
  std::vector<Composition> children = {};  // of a block
  std::vector<double> weights = {};        // of an Average, as they are used: one for each child
  std::vector<int64_t> sizes = {};         // tokens of a Split (splits), rows of a BatchSplit (batch_sizes)
};

// The library's name of a block: "Stack".
TORCHGRAFT_PATCH_API const char* to_string(BlockKind kind);

// The adapters of a composition, each once, in the order in which they stand there.
TORCHGRAFT_PATCH_API std::vector<std::string> adapters_in(const Composition& composition);

// The leaf that comes first, and the one that comes last. The library takes how a block reads its input from the first.
const std::string& first_adapter(const Composition& composition);
const std::string& last_adapter(const Composition& composition);

// The name of a Fuse's AdapterFusion layer: its own, or that of its children, joined by commas.
std::string fusion_name(const Composition& fuse);

// Those names of all Fuses in a composition, each once.
TORCHGRAFT_PATCH_API std::vector<std::string> fusion_names(const Composition& composition);

// Whether it has a Split or a BatchSplit: its inputs have as many tokens or rows as their sizes say.
TORCHGRAFT_PATCH_API bool splits_inputs(const Composition& composition);

// Whether it has a Parallel, and how many rows that makes of one row of the batch; 1 without one.
TORCHGRAFT_PATCH_API bool has_parallel(const Composition& composition);
TORCHGRAFT_PATCH_API int64_t parallel_channels(const Composition& composition);

// A copy in which `name` is called `new_name`.
Composition with_renamed(Composition composition, const std::string& name, const std::string& new_name);

// Throws c10::Error where the library refuses: a block within another that must not hold it (ALLOWED_NESTINGS), too
// many levels, numbers that do not fit. `what` begins the message.
TORCHGRAFT_PATCH_API void check_composition(const Composition& composition, const std::string& what);

// Reads what the library writes into adapter_setup.json (to_dict): {"type": "Stack", "children": [...], "kwargs": {}}.
// Throws c10::Error as check_composition does, and for keys and types that are not known.
TORCHGRAFT_PATCH_API Composition composition_from_json(std::string_view text);
TORCHGRAFT_PATCH_API std::string composition_to_json(const Composition& composition);

// Divides weights by their sum. Throws c10::Error where that is 0.
void divide_by_sum(std::vector<double>& weights);

// A copy whose weights of each Average are divided by their sum: the library does so where it reads adapter_setup.json.
TORCHGRAFT_PATCH_API Composition normalised(Composition composition);

}  // namespace torchgraft
