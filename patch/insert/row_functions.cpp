#include <torchgraft/patch/insert/row_functions.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/source_parts.h>
#include <torchgraft/registration/masked_score.h>
#include <torchgraft/registration/token_mask_error.h>

namespace torchgraft {
namespace {

using torch::jit::Value;

// A bank is read as [1, ...] when all rows use one adapter, and as [B, ...] when each has its own; both broadcast. A
// row without an adapter has a gate of 0, which removes what a method adds, and sees no prefix; where a gate would meet
// a product of the first adapter's weights, which may be no numbers, `present` has zeros for them. 11 is torch.bool:
// TorchScript that is compiled in C++ has no name for it. 4 is torch.int64. 6 is torch.float32, in which gates of
// 16-bit inputs are computed, as in ops/gate.cpp: a sum with it is at least that wide.
//
// check_ids says what the ops say (ops/check.cpp, ops/bank.cpp). Reading ids on a GPU would wait for it.
// text_of and seen_by_real_queries are those of ops/forward/attention_token_mask.cpp.
constexpr const char* kRowFunctions = R"python(
def check_ids(op: str, x: Tensor, adapter_ids: Optional[Tensor], bank: Tensor) -> None:
    if adapter_ids is not None:
        sizes = list(adapter_ids.size())
        assert sizes == [x.size(0)], "{}: expected adapter_ids of shape [{}], got {}".format(op, x.size(0), sizes)
        assert adapter_ids.dtype == 4, "{}: expected adapter_ids of dtype Long, got another".format(op)
        if not adapter_ids.is_cuda:
            wrong = torch.logical_or(adapter_ids.lt(-1), adapter_ids.ge(bank.size(0))).nonzero()
            if wrong.size(0) > 0:
                row = int(wrong[0, 0])
                assert False, "{}: expected adapter_ids in [-1, {}), got {} in row {}".format(
                    op, bank.size(0), int(adapter_ids[row]), row)

def selected(bank: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    if adapter_ids is None:
        return bank.narrow(0, max(adapter, 0), 1)
    return bank.index_select(0, adapter_ids.clamp(min=0))

def present(bank: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    rows = selected(bank, adapter_ids, adapter)
    if adapter_ids is None:
        if adapter < 0:
            return torch.zeros_like(rows)
        return rows
    return rows.masked_fill(adapter_ids.lt(0).view([-1] + [1] * (rows.dim() - 1)), 0)

def is_active(x: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    if adapter_ids is None:
        return torch.full([1], int(adapter >= 0), dtype=11, device=x.device)
    return adapter_ids.ge(0)

def pooled(x: Tensor, gate_weight: Optional[Tensor], gate_bias: Optional[Tensor], adapter_ids: Optional[Tensor],
           adapter: int, token_mask: Optional[Tensor]) -> Tensor:
    if gate_weight is not None and gate_bias is not None:
        weight = selected(gate_weight, adapter_ids, adapter)
        float32 = torch.zeros([1], dtype=6, device=x.device)
        gates = torch.sigmoid(torch.matmul(x, weight.transpose(1, 2)) + float32 +
                              selected(gate_bias, adapter_ids, adapter).unsqueeze(1))
        if token_mask is not None:
            keep = token_mask.unsqueeze(-1)
            gate = gates.masked_fill(torch.logical_not(keep), 0).sum(1) / keep.sum(1).clamp(min=1).to(gates.dtype)
        else:
            gate = gates.mean(1)
        gate = gate.to(x.dtype)
    else:
        gate = torch.ones([x.size(0), 1], dtype=x.dtype, device=x.device)
    active = is_active(x, adapter_ids, adapter).unsqueeze(-1)
    return torch.where(active, gate, torch.zeros_like(gate))

def whole_rows(x: Tensor, pools_all: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    count = pools_all.size(0) - 1
    if adapter_ids is None:
        return pools_all.narrow(0, max(adapter, 0), 1)
    check_ids("forward", x, adapter_ids, pools_all.narrow(0, 0, count))
    return pools_all.index_select(0, torch.remainder(adapter_ids, count + 1))

def shown_to_rows(mask: Optional[Tensor], rows: Tensor) -> Optional[Tensor]:
    if mask is None:
        return None
    else:
        visible = mask
        if visible.dtype != 11:
            visible = visible.gt(MASKED_SCORE)
        sizes = list(visible.size())
        visible = visible.view([1] * (4 - len(sizes)) + sizes)
        return torch.logical_or(visible, rows.view(-1, 1, 1, 1))

def shown_to_whole_rows(mask: Optional[Tensor], x: Tensor, pools_all: Tensor, adapter_ids: Optional[Tensor],
                        adapter: int) -> Optional[Tensor]:
    return shown_to_rows(mask, whole_rows(x, pools_all, adapter_ids, adapter))

def has_positions(x: Tensor, positions: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    check_ids("reft", x, adapter_ids, positions)
    return torch.logical_and(selected(positions, adapter_ids, adapter).gt(0).any(1),
                             is_active(x, adapter_ids, adapter))

def pooled_tokens(mask: Tensor, pools_all: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    return torch.logical_or(mask, whole_rows(mask, pools_all, adapter_ids, adapter).unsqueeze(-1))

def normed(x: Tensor, weight: Tensor, bias: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    plain = torch.layer_norm(x, [x.size(-1)], None, None, 1e-05)
    own_weight = selected(weight, adapter_ids, adapter).unsqueeze(1)
    return plain * own_weight + selected(bias, adapter_ids, adapter).unsqueeze(1)

def scaled(base: Tensor, vector: Tensor, scaling: Tensor, gate: Tensor, adapter_ids: Optional[Tensor],
           adapter: int) -> Tensor:
    coefficient = selected(scaling, adapter_ids, adapter).unsqueeze(-1) * gate
    return base * (selected(vector, adapter_ids, adapter).squeeze(-1) * coefficient).unsqueeze(1)

def looked_up(lora_a: Tensor, tokens: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tuple[Tensor, Tensor]:
    rows = torch.full([1], adapter, dtype=4, device=tokens.device) if adapter_ids is None else adapter_ids
    columns = lora_a[rows.clamp(min=0).unsqueeze(1), :, tokens]
    columns = columns.masked_fill(rows.lt(0).view(-1, 1, 1), 0)
    unit = torch.eye(lora_a.size(1), dtype=lora_a.dtype, device=lora_a.device)
    return columns, unit.expand(lora_a.size(0), lora_a.size(1), lora_a.size(1))

def shifted(x: Tensor, bias: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    chosen = selected(bias, adapter_ids, adapter)
    active = is_active(x, adapter_ids, adapter).unsqueeze(-1)
    return x + torch.where(active, chosen, torch.zeros_like(chosen)).unsqueeze(1)

def with_magnitude(x: Tensor, magnitude: Tensor, weight_norm: Tensor, fixed: Tensor, adapter_ids: Optional[Tensor],
                   adapter: int) -> Tensor:
    ratio = (selected(magnitude, adapter_ids, adapter) / selected(weight_norm, adapter_ids, adapter)).unsqueeze(1)
    constant = selected(fixed, adapter_ids, adapter).unsqueeze(1)
    return (x - constant) * ratio + constant

def text_of(visible: Tensor) -> Tensor:
    positions = torch.arange(visible.size(-1), device=visible.device)
    sees_all = visible.all(-1)
    quiet = torch.logical_not(sees_all)
    is_shown = torch.logical_and(torch.logical_and(visible, quiet.unsqueeze(-1)), sees_all.unsqueeze(-2)).any(-1)
    several = torch.logical_or(sees_all.sum(-1, True).gt(1), quiet.select(-1, -1).unsqueeze(-1))
    are_apart = torch.logical_and(quiet.any(-1, True), torch.logical_not(is_shown.any(-1, True)))
    blind = torch.logical_and(sees_all, torch.logical_and(are_apart, several))
    used = torch.logical_not(blind)
    visible = torch.logical_and(torch.logical_and(visible, used.unsqueeze(-1)), used.unsqueeze(-2))

    others = torch.logical_and(visible, positions.unsqueeze(-1).ne(positions))
    itself = torch.diagonal(visible, 0, -2, -1)
    linked = torch.logical_or(others.any(-1), others.any(-2))
    has_links = linked.any(-1, True)
    start = torch.mul(torch.where(has_links, linked, itself), positions).amax([-1], True)
    at_start = positions.eq(start)
    real = torch.logical_and(visible, at_start.unsqueeze(-1)).any(-2)
    grows = True
    while grows:
        before = real
        real = torch.logical_or(real, torch.logical_and(visible, real.unsqueeze(-1)).any(-2))
        grows = not torch.equal(real, before)
    rest = torch.logical_and(real, torch.logical_not(at_start))
    has_rest = rest.any(-1, True)

    padding = torch.logical_not(real)
    sees_padding = torch.logical_and(others, padding.unsqueeze(-2)).any(-1)
    sees_text_and_itself = torch.logical_and(torch.logical_and(padding, itself),
                                             torch.logical_and(others.any(-1), torch.logical_not(sees_padding)))
    alone = torch.logical_and(itself, torch.logical_not(linked))
    behind_rest = torch.where(rest, positions, torch.full_like(positions, -1)).amax([-1], True).lt(positions)

    seen_by_rest = torch.logical_and(others, rest.unsqueeze(-1)).any(-2)
    is_unseen = torch.logical_and(torch.logical_and(real, at_start), torch.logical_not(seen_by_rest)).any(-1, True)
    is_like_padding = torch.logical_and(has_rest, torch.logical_and(sees_text_and_itself, behind_rest).any(-1, True))
    unseen_rest = torch.logical_and(rest, torch.logical_not(seen_by_rest)).any(-1, True)
    rest_sees_rest = torch.logical_and(rest.sum(-1, True).gt(1), torch.logical_not(unseen_rest))
    one_alone_behind = torch.logical_and(alone, positions.gt(start)).sum(-1, True).eq(1)
    end_is_unknown = torch.logical_and(torch.logical_and(is_unseen, torch.logical_not(is_like_padding)),
                                       torch.logical_or(rest_sees_rest, one_alone_behind))
    several_alone = torch.logical_and(torch.logical_not(has_links), itself.sum(-1, True).gt(1))
    first_real = torch.where(real, positions, torch.full_like(positions, visible.size(-1))).amin([-1], True)
    within = torch.logical_and(blind, torch.logical_and(positions.gt(first_real), positions.lt(start)))
    unknown = torch.logical_or(torch.logical_and(padding, sees_padding).any(-1, True), end_is_unknown)
    unknown = torch.logical_or(unknown, torch.logical_or(several_alone, within.any(-1, True)))
    wrong = unknown.squeeze(-1).nonzero()
    if wrong.size(0) > 0:
        assert False, TEXT_IS_NOT_KNOWN.format(int(wrong[0, 0]))
    return torch.where(torch.logical_and(is_unseen, is_like_padding), rest, real)

def seen_by_real_queries(visible: Tensor) -> Tensor:
    by_any = visible.any(-2)
    if visible.size(-2) < 2 or visible.size(-2) != visible.size(-1):
        return by_any
    if torch.equal(visible, visible.narrow(-2, 0, 1).expand_as(visible)):
        return by_any
    real = text_of(visible.unsqueeze(0) if visible.dim() == 2 else visible)
    return torch.where(real.any(-1, True), real, by_any)

def position_flags(x: Tensor, positions: Tensor, adapter_ids: Optional[Tensor], adapter: int,
                   token_mask: Optional[Tensor]) -> Tensor:
    tokens = torch.arange(x.size(1), device=x.device).unsqueeze(0)
    counts = selected(positions, adapter_ids, adapter).clamp(max=x.size(1) + 1)
    begin = torch.zeros_like(counts.narrow(1, 0, 1))
    end = begin + x.size(1)
    if token_mask is not None:
        begin = token_mask.to(4).argmax(1, True)
        end = begin + token_mask.sum(1, True)
    at_prefix = torch.logical_and(tokens.ge(begin), tokens.lt(begin + counts.narrow(1, 0, 1)))
    at_suffix = torch.logical_and(tokens.ge(end - counts.narrow(1, 1, 1)), tokens.lt(end))
    if not x.is_cuda:
        mixed_up = torch.logical_and(counts.select(1, 0).gt(0), counts.select(1, 1).gt(x.size(1)))
        active = is_active(x, adapter_ids, adapter)
        assert not bool(torch.logical_and(mixed_up, active).any()), "reft: expected at least as many tokens as " \
            "there are suffix positions beside prefix positions, got {}: the adapters library mixes up the " \
            "positions of such a batch; pad it".format(x.size(1))
    return torch.logical_and(torch.stack([at_prefix, at_suffix], 1),
                             is_active(x, adapter_ids, adapter).view(-1, 1, 1))

def at_positions(positions: Tensor, x: Tensor, other: Tensor, adapter_ids: Optional[Tensor], adapter: int,
                 token_mask: Optional[Tensor]) -> Tensor:
    flags = position_flags(x, positions, adapter_ids, adapter, token_mask)
    return torch.where(flags.any(1).unsqueeze(-1), x, other)

def choose(present: Tensor, x: Tensor, other: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    chosen = torch.logical_and(selected(present, adapter_ids, adapter), is_active(x, adapter_ids, adapter))
    return torch.where(chosen.view(-1, 1, 1), x, other)
)python";

}  // namespace

const std::string& row_source() {
  static const std::string source = [] {
    std::string text = kRowFunctions;
    const auto fill = [&](const std::string& word, const std::string& by) {
      text.replace(text.find(word), word.size(), by);
    };
    fill("TEXT_IS_NOT_KNOWN", '"' + std::string(kTextIsNotKnown) + '"');
    fill("MASKED_SCORE", number_source(kMaskedScore));
    return text;
  }();
  return source;
}

Value* RowFunctions::call(const std::string& name, std::vector<Value*> arguments) {
  return torch::jit::insertGraph(graph_, *compile_graph(row_source(), name), arguments)[0];
}

void RowFunctions::check_ids(const std::string& op, Value* x, Value* bank) {
  torch::jit::insertGraph(graph_, *compile_graph(row_source(), "check_ids"),
                          {graph_.insertConstant(op), x, adapter_ids_, bank});
}

Value* RowFunctions::normed(Value* x, Value* weight, Value* bias) {
  return call("normed", {x, weight, bias, adapter_ids_, adapter_});
}

Value* RowFunctions::pooled(Value* x, Value* gate_weight, Value* gate_bias, Value* token_mask) {
  return call("pooled", {x, gate_weight, gate_bias, adapter_ids_, adapter_, token_mask});
}

Value* RowFunctions::pooled_tokens(Value* mask, Value* pools_all) {
  return call("pooled_tokens", {mask, pools_all, adapter_ids_, adapter_});
}

Value* RowFunctions::shown_to_whole_rows(Value* mask, Value* x, Value* pools_all) {
  return call("shown_to_whole_rows", {mask, x, pools_all, adapter_ids_, adapter_});
}

Value* RowFunctions::shown_without_positions(Value* mask, Value* x, at::ArrayRef<Value*> positions) {
  Value* any = nullptr;
  for (Value* bank : positions) {
    Value* some = call("has_positions", {x, bank, adapter_ids_, adapter_});
    any = any ? graph_.insert(c10::aten::logical_or, {any, some}) : some;
  }
  TORCH_INTERNAL_ASSERT(any, "a mask is shown to rows of ReFT, and no slot has positions");
  return call("shown_to_rows", {mask, graph_.insert(c10::aten::logical_not, {any})});
}

Value* RowFunctions::scaled(Value* base, Value* vector, Value* scaling, Value* gate) {
  return call("scaled", {base, vector, scaling, gate, adapter_ids_, adapter_});
}

Value* RowFunctions::shifted(Value* x, Value* bias) { return call("shifted", {x, bias, adapter_ids_, adapter_}); }

std::pair<Value*, Value*> RowFunctions::looked_up(Value* lora_a, Value* tokens) {
  Value* pair = call("looked_up", {lora_a, tokens, adapter_ids_, adapter_});
  torch::jit::Node* parts = graph_.insertNode(graph_.createTupleUnpack(pair));
  return {parts->outputs()[0], parts->outputs()[1]};
}

Value* RowFunctions::with_magnitude(Value* x, Value* magnitude, Value* weight_norm, Value* fixed) {
  return call("with_magnitude", {x, magnitude, weight_norm, fixed, adapter_ids_, adapter_});
}

Value* RowFunctions::at_positions(Value* positions, Value* token_mask, Value* x, Value* other) {
  return call("at_positions", {positions, x, other, adapter_ids_, adapter_, token_mask});
}

Value* RowFunctions::choose(Value* present, Value* x, Value* other) {
  return call("choose", {present, x, other, adapter_ids_, adapter_});
}

}  // namespace torchgraft
