#include <torchgraft/patch/insert/wider_masks.h>

namespace torchgraft {

// 11 is torch.bool. The last dimension of a mask is the keys', the one before it the queries', unless that one is
// broadcast.
const std::string& wider_mask_source() {
  static const std::string source = R"python(
def longer(mask: Tensor, added: int, lengths: Tensor, own: Optional[Tensor], fill: float, dim: int,
           has_rows: bool) -> Tensor:
    new = torch.full_like(mask.narrow(dim, 0, 1), fill).repeat_interleave(added, dim)
    wide = torch.cat([new, mask], dim)
    if own is None:
        return wide
    sizes = list(wide.size())
    rows = own.size(0)
    assert has_rows and (sizes[0] == 1 or sizes[0] == rows), "prompt_tuning: expected attention masks of shape [{}, " \
        "1 or heads, 1 or tokens, tokens] where prompts of a batch have different lengths, got one of shape {}; put " \
        "rows with prompts of different lengths in batches of their own".format(rows, list(mask.size()))
    at = torch.arange(sizes[dim], device=mask.device).unsqueeze(0).sub(lengths.unsqueeze(-1)).add(added)
    shape = [1] * len(sizes)
    shape[0] = rows
    shape[dim] = sizes[dim]
    sizes[0] = rows
    return wide.expand(sizes).gather(dim, at.clamp(max=sizes[dim] - 1).view(shape).expand(sizes))
def wider(mask: Tensor, tokens: int, added: int, lengths: Tensor, own: Optional[Tensor], fill: float,
          has_keys_only: bool, is_final: bool) -> Tensor:
    if added == 0 or mask.dim() == 0:
        return mask
    if mask.size(-1) == 1:
        mask = mask.expand(list(mask.size())[:-1] + [tokens])
    if own is not None and is_final and mask.dim() < 4:
        mask = mask.reshape([1] * (4 - mask.dim()) + list(mask.size()))
    has_rows = mask.dim() == 4 or (has_keys_only and mask.dim() == 2)
    if not has_keys_only and mask.dim() > 1 and mask.size(-2) > 1:
        assert torch.equal(mask, mask.narrow(-2, 0, 1).expand(list(mask.size()))), "prompt_tuning: expected " \
            "attention masks that are the same for all queries, got one of shape {} whose rows differ, as of a " \
            "causal model or of relative positions: what a prompt sees there is not known; use prefix_tuning, or a " \
            "mask of keys alone".format(list(mask.size()))
        mask = longer(mask, added, lengths, own, fill, -2, has_rows)
    return longer(mask, added, lengths, own, fill, -1, has_rows)
def visible(mask: Tensor) -> float:
    return 1.0 if mask.dtype == 11 else 0.0
def wider_mask(mask: Tensor, tokens: int, added: int, lengths: Tensor, own: Optional[Tensor]) -> Tensor:
    return wider(mask, tokens, added, lengths, own, visible(mask), False, True)
def wider_optional(mask: Optional[Tensor], tokens: int, added: int, lengths: Tensor,
                   own: Optional[Tensor]) -> Optional[Tensor]:
    if mask is None:
        return None
    return wider_mask(mask, tokens, added, lengths, own)
def wider_flags(mask: Tensor, tokens: int, added: int, lengths: Tensor, own: Optional[Tensor],
                has_keys_only: bool) -> Tensor:
    return wider(mask, tokens, added, lengths, own, 0.0, has_keys_only and mask.dim() < 3, not has_keys_only)
def wider_keys(mask: Tensor, tokens: int, added: int, lengths: Tensor, own: Optional[Tensor],
               has_keys_only: bool) -> Tensor:
    return wider(mask, tokens, added, lengths, own, visible(mask), has_keys_only and mask.dim() < 3, False)
def shown(mask: Optional[Tensor], own: Optional[Tensor]) -> Optional[Tensor]:
    if own is None:
        return mask
    keys = own.unsqueeze(1).unsqueeze(1)
    if mask is None:
        return keys
    if mask.dtype == 11:
        return torch.logical_and(mask, keys)
    return torch.where(keys, mask, torch.full_like(mask.narrow(-1, 0, 1), float("-inf")))
)python";
  return source;
}

}  // namespace torchgraft
