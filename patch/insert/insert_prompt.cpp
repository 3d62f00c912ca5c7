#include <torchgraft/patch/insert/insert_prompt.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/insert/prompt_flow.h>
#include <torchgraft/patch/insert/row_functions.h>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

namespace {

// lengths and begins are [B], or [1] where all rows use one adapter. A row's tokens are its first `begin` ones, its
// prompt, its others, and as many copies of its last one as it takes to be as long as the batch. As in the library, the
// mask of the prompt comes first whatever `begin` is. 11 is torch.bool, 4 is torch.int64.
const std::string& prompt_source() {
  static const std::string source = row_source() + R"python(
def prompt_lengths(x: Tensor, prompt_length: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    check_ids("prompt_tuning", x, adapter_ids, prompt_length)
    return present(prompt_length, adapter_ids, adapter)

def with_prompts(x: Tensor, prompt: Tensor, prompt_begin: Tensor, lengths: Tensor, adapter_ids: Optional[Tensor],
                 adapter: int) -> Tensor:
    longest = int(lengths.max())
    begin = selected(prompt_begin, adapter_ids, adapter).unsqueeze(-1)
    length = lengths.unsqueeze(-1)
    prompts = selected(prompt, adapter_ids, adapter).narrow(1, 0, longest).to(x.dtype)
    joined = torch.cat([prompts.expand(x.size(0), longest, x.size(2)), x], 1)
    at = torch.arange(longest + x.size(1), device=x.device).unsqueeze(0)
    behind = at.sub(length).add(longest).clamp(max=longest + x.size(1) - 1)
    index = torch.where(at.lt(begin), at.add(longest), torch.where(at.lt(begin + length), at.sub(begin), behind))
    return joined.gather(1, index.unsqueeze(-1).expand(x.size(0), longest + x.size(1), x.size(2)))

def own_tokens(x: Tensor, lengths: Tensor) -> Tensor:
    tokens = int(lengths.max()) + x.size(1)
    at = torch.arange(tokens, device=x.device).unsqueeze(0)
    return at.lt(lengths.unsqueeze(-1).add(x.size(1))).expand(x.size(0), tokens)

def with_prompts_shown(mask: Optional[Tensor], x: Tensor, lengths: Tensor) -> Optional[Tensor]:
    longest = int(lengths.max())
    tokens = x.size(1)
    result = mask
    if mask is None:
        if int(lengths.min()) < longest:
            result = own_tokens(x, lengths).view(x.size(0), 1, 1, longest + tokens)
    elif longest > 0:
        sizes = list(mask.size())
        assert sizes[-1] == tokens, "prompt_tuning: expected attention masks of {} tokens, got {}".format(
            tokens, sizes[-1])
        each = mask.view([1] * (4 - len(sizes)) + sizes) if len(sizes) < 4 else mask
        first = each.narrow(2, 0, 1)
        assert each.size(2) == 1 or torch.equal(each, first.expand_as(each)), "prompt_tuning: expected attention " \
            "masks that are the same for all queries, got one that is not: a causal one, or one with relative " \
            "positions; train prefix_tuning instead"
        at = torch.arange(longest + tokens, device=x.device).sub(lengths.unsqueeze(-1)).view(-1, 1, 1, longest + tokens)
        rows = max(first.size(0), at.size(0))
        index = at.clamp(min=0, max=tokens - 1).expand(rows, first.size(1), 1, longest + tokens)
        found = first.expand(rows, first.size(1), 1, tokens).gather(-1, index)
        if found.dtype == 11:
            result = found.logical_or(at.lt(0)).logical_and(at.lt(tokens))
        else:
            result = found.masked_fill(at.lt(0), 0.0).masked_fill(at.ge(tokens), float("-inf"))
    return result
)python";
  return source;
}

}  // namespace

Value* PromptInserter::call(const char* function, std::vector<Value*> arguments) {
  return torch::jit::insertGraph(graph_, *compile_graph(prompt_source(), function), arguments)[0];
}

PromptInserter::PromptInserter(Inserter& inserter, const GraphSites& sites, const Slot& slot,
                               const torch::jit::Module& root)
    : inserter_(inserter), graph_(inserter.graph()), site_(sites.embeddings.value()) {
  Node* maker = site_.value->node();
  end_ = inserter.marker_behind(maker->kind() == c10::prim::Param ? inserter.top() : maker);
  PromptFlow flow(graph_, sites, end_, root);
  WithInsertPoint guard(end_);
  Value* module = inserter.slot_module(slot);
  rows_ = inserter.swapped(site_.value, site_.sequence_first);
  lengths_ = call("prompt_lengths", {rows_, inserter.parameter(slot, module, "prompt_length"), inserter.adapter_ids(),
                                     inserter.active()});
  Value* joined = call("with_prompts", {rows_, inserter.parameter(slot, module, "prompt"),
                                        inserter.parameter(slot, module, "prompt_begin"), lengths_,
                                        inserter.adapter_ids(), inserter.active()});
  own_tokens_ = call("own_tokens", {rows_, lengths_});
  Value* tokens = graph_.insert(c10::aten::size, {joined, 1});
  Value* swapped = inserter.swapped(joined, site_.sequence_first);
  result_ = site_.sequence_first ? graph_.insert(c10::aten::contiguous, {swapped}) : swapped;
  flow.replace_sizes(tokens);
  for (const auto& [node, input] : flow.masks()) {
    replace_mask(node, input);
  }
}

void PromptInserter::replace_mask(Node* node, size_t input) {
  Value* mask = node->input(input);
  Value*& shown = masks_[mask];
  const bool is_shared = node->owningBlock() == graph_.block();
  if (!shown || !is_shared) {
    WithInsertPoint guard(node);
    Value* made = call("with_prompts_shown", {mask, rows_, lengths_});
    node->replaceInput(input, made);
    if (is_shared) {
      shown = made;
    }
    return;
  }
  node->replaceInput(input, shown);
}

void PromptInserter::finish() {
  site_.value->replaceAllUsesAfterNodeWith(end_, result_);
  end_->destroy();
}

}  // namespace torchgraft
