#pragma once

#include <torchgraft/patch/adapters/compositions.h>

#include <cstdint>
#include <string>
#include <vector>

// The rows of a Parallel: each row of the batch becomes as many rows as the Parallel has children, its channels.
namespace torchgraft {

// How many rows a row of each composition becomes; 1 for all but those with a Parallel.
std::vector<int64_t> channels_of(const std::vector<NamedComposition>& compositions);
bool has_parallel(const std::vector<NamedComposition>& compositions);

// The adapters whose heads the channels of a composition have, as parse_heads_from_composition() of the library says;
// empty where it ends in no Parallel.
std::vector<std::string> channel_heads(const Composition& tree);

// TorchScript functions. `adapter_ids` and `active` are those of forward, `first` is the id of the first composition.
//
//   repeated_index(adapter_ids, active, rows, device, first, channels) -> Tensor?    of the rows that forward computes,
//       which row of the batch each is; None where all rows stay one. First come all rows of the batch with their first
//       channel, then those that have a second one, and so on: rows of a Parallel alone stand child by child, as in the
//       adapters library.
//   repeated_ids(adapter_ids, active, index) -> Tensor?     the ids of these rows.
//   given_ids(adapter_ids, index) -> Tensor?                the same; None where the active one is that of all rows.
//   ids_of_rows(adapter_ids, first, channels) -> Tensor?    the same, for ids that forward got.
//   index_of_result(result, adapter_ids, active, first, channels) -> Tensor?    repeated_index, of rows of a result.
//   repeated_mask(mask, index) -> Tensor?
//   heads_of_channels(adapter_ids, head_ids, first, channels, heads) -> Tensor?    head_ids, with `heads` of its
//       channels at rows of a Parallel. adapter_ids: repeated_ids.
extern const char* const kParallelRows;

}  // namespace torchgraft
