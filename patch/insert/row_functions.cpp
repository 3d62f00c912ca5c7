#include <torchgraft/patch/insert/row_functions.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/registration/masked_score.h>

namespace torchgraft {
namespace {

using torch::jit::Value;

// A bank is read as [1, ...] when all rows use one adapter, and as [B, ...] when each has its own; both broadcast. A
// row without an adapter has a gate of 0, which removes what a method adds, and sees no prefix. 11 is torch.bool:
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

def pooled_tokens(mask: Tensor, pools_all: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    count = pools_all.size(0) - 1
    if adapter_ids is None:
        whole = pools_all.narrow(0, max(adapter, 0), 1)
    else:
        check_ids("forward", mask, adapter_ids, pools_all.narrow(0, 0, count))
        whole = pools_all.index_select(0, torch.remainder(adapter_ids, count + 1))
    return torch.logical_or(mask, whole.unsqueeze(-1))

def normed(x: Tensor, weight: Tensor, bias: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    plain = torch.layer_norm(x, [x.size(-1)], None, None, 1e-05)
    own_weight = selected(weight, adapter_ids, adapter).unsqueeze(1)
    return plain * own_weight + selected(bias, adapter_ids, adapter).unsqueeze(1)

def scaled(base: Tensor, vector: Tensor, scaling: Tensor, gate: Tensor, adapter_ids: Optional[Tensor],
           adapter: int) -> Tensor:
    coefficient = selected(scaling, adapter_ids, adapter).unsqueeze(-1) * gate
    return base * (selected(vector, adapter_ids, adapter).squeeze(-1) * coefficient).unsqueeze(1)

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
    tokens = visible.size(-1)
    positions = torch.arange(tokens, device=visible.device)
    others = torch.logical_and(visible, positions.unsqueeze(-1).ne(positions))
    linked = torch.logical_or(others.any(-1), others.any(-2))
    last = torch.where(linked, positions, torch.full_like(positions, -1)).max(-1)[0]
    start = torch.where(last.lt(0), torch.full_like(last, tokens - 1), last)
    real = torch.logical_and(visible, positions.eq(start.unsqueeze(-1)).unsqueeze(-1)).any(-2)
    grows = True
    while grows:
        before = real
        real = torch.logical_or(real, torch.logical_and(visible, real.unsqueeze(-1)).any(-2))
        grows = not torch.equal(real, before)
    among_real = torch.logical_and(torch.logical_and(others, real.unsqueeze(-1)), real.unsqueeze(-2))
    sees_later = torch.logical_and(among_real, positions.unsqueeze(-1).lt(positions)).any(-1).any(-1)
    stands_alone = torch.logical_and(visible.select(-2, -1).select(-1, -1), start.lt(tokens - 1))
    sees_text = torch.logical_and(visible, real.unsqueeze(-2)).any(-1)
    elsewhere = torch.logical_and(others.any(-1), torch.logical_not(sees_text)).any(-1)
    ambiguous = torch.logical_or(torch.logical_and(stands_alone, torch.logical_not(sees_later)), elsewhere).nonzero()
    if ambiguous.size(0) > 0:
        assert False, GROUPS_MESSAGE.format(int(ambiguous[0, 0]))
    return torch.where(sees_later.unsqueeze(-1), among_real.any(-2), real)

def seen_by_real_queries(visible: Tensor) -> Tensor:
    by_any = visible.any(-2)
    if visible.size(-2) == 1 or visible.size(-2) != visible.size(-1):
        return by_any
    real = text_of(visible.unsqueeze(0) if visible.dim() == 2 else visible)
    return torch.where(real.any(-1, True), real, by_any)

def choose(present: Tensor, x: Tensor, other: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    chosen = torch.logical_and(selected(present, adapter_ids, adapter), is_active(x, adapter_ids, adapter))
    return torch.where(chosen.view(-1, 1, 1), x, other)
)python";

}  // namespace

const std::string& row_source() {
  static const std::string source = [] {
    std::string text = kRowFunctions;
    const std::string word = "GROUPS_MESSAGE";
    return text.replace(text.find(word), word.size(), '"' + std::string(kGroupsOfTokens) + '"');
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

Value* RowFunctions::scaled(Value* base, Value* vector, Value* scaling, Value* gate) {
  return call("scaled", {base, vector, scaling, gate, adapter_ids_, adapter_});
}

Value* RowFunctions::shifted(Value* x, Value* bias) { return call("shifted", {x, bias, adapter_ids_, adapter_}); }

Value* RowFunctions::with_magnitude(Value* x, Value* magnitude, Value* weight_norm, Value* fixed) {
  return call("with_magnitude", {x, magnitude, weight_norm, fixed, adapter_ids_, adapter_});
}

Value* RowFunctions::choose(Value* present, Value* x, Value* other) {
  return call("choose", {present, x, other, adapter_ids_, adapter_});
}

}  // namespace torchgraft
