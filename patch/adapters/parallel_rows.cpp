#include <torchgraft/patch/adapters/parallel_rows.h>

#include <algorithm>

namespace torchgraft {

// 4 is torch.int64: TorchScript that is compiled in C++ has no name for it.
const char* const kParallelRows = R"python(
def repeated_index(adapter_ids: Optional[Tensor], active: int, rows: int, device: Device, first: int,
                   channels: List[int]) -> Optional[Tensor]:
    if adapter_ids is None:
        times = 1
        if active >= first:
            times = channels[active - first]
        if times == 1:
            return None
        return torch.arange(rows, device=device).repeat([times])
    else:
        most = 1
        counts = torch.ones_like(adapter_ids)
        for i in range(len(channels)):
            if channels[i] > 1:
                own = adapter_ids.eq(first + i)
                if bool(own.any()):
                    most = max(most, channels[i])
                    counts = counts.masked_fill(own, channels[i])
        if most == 1:
            return None
        assert adapter_ids.dim() == 1 and adapter_ids.size(0) == rows, "forward: adapter_ids name a composition " \
            "with a Parallel; expected one id for each of the batch's {} rows, got ids of the size {}".format(
                rows, adapter_ids.size())
        parts: List[Tensor] = []
        for i in range(most):
            parts.append(counts.gt(i).nonzero().view(-1))
        return torch.cat(parts)

def repeated_ids(adapter_ids: Optional[Tensor], active: int, index: Optional[Tensor]) -> Optional[Tensor]:
    if index is None:
        return adapter_ids
    else:
        if adapter_ids is None:
            return torch.full([index.size(0)], active, dtype=4, device=index.device)
        else:
            return adapter_ids.index_select(0, index)

def given_ids(adapter_ids: Optional[Tensor], index: Optional[Tensor]) -> Optional[Tensor]:
    if adapter_ids is None or index is None:
        return adapter_ids
    else:
        return adapter_ids.index_select(0, index)

def ids_of_rows(adapter_ids: Optional[Tensor], first: int, channels: List[int]) -> Optional[Tensor]:
    if adapter_ids is None:
        return None
    else:
        index = repeated_index(adapter_ids, -1, adapter_ids.size(0), adapter_ids.device, first, channels)
        return given_ids(adapter_ids, index)

def index_of_result(result: Tensor, adapter_ids: Optional[Tensor], active: int, first: int,
                    channels: List[int]) -> Optional[Tensor]:
    rows = result.size(0)
    if adapter_ids is not None:
        rows = adapter_ids.size(0)
    elif active >= first:
        rows = rows // channels[active - first]
    return repeated_index(adapter_ids, active, rows, result.device, first, channels)

def repeated_mask(mask: Optional[Tensor], index: Optional[Tensor]) -> Optional[Tensor]:
    if mask is None or index is None:
        return mask
    else:
        return mask.index_select(0, index)

def heads_of_channels(adapter_ids: Optional[Tensor], head_ids: Optional[Tensor], first: int, channels: List[int],
                      heads: List[List[int]]) -> Optional[Tensor]:
    if adapter_ids is None or head_ids is None:
        return None
    else:
        result = head_ids
        for i in range(len(channels)):
            if channels[i] > 1:
                own = adapter_ids.eq(first + i).nonzero().view([channels[i], -1])
                for channel in range(len(heads[i])):
                    result = result.index_fill(0, own[channel], heads[i][channel])
        return result
)python";

std::vector<int64_t> channels_of(const std::vector<NamedComposition>& compositions) {
  std::vector<int64_t> channels;
  for (const NamedComposition& composition : compositions) {
    channels.push_back(parallel_channels(composition.tree));
  }
  return channels;
}

std::vector<std::string> channel_heads(const Composition& tree) {
  const Composition& last = tree.kind == BlockKind::kStack ? tree.children.back() : tree;
  std::vector<std::string> result;
  if (last.kind == BlockKind::kParallel) {
    for (const Composition& child : last.children) {
      result.push_back(last_adapter(child));
    }
  }
  return result;
}

bool has_parallel(const std::vector<NamedComposition>& compositions) {
  return std::any_of(compositions.begin(), compositions.end(),
                     [](const NamedComposition& held) { return has_parallel(held.tree); });
}

}  // namespace torchgraft
