#include <torchgraft/patch/insert/insert_prompt.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/insert/row_functions.h>
#include <torchgraft/patch/insert/unequal_rows.h>

#include <c10/util/Exception.h>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

namespace {

// Lengths and begins are [B], or [1] where all rows use one adapter; a row of the base has a prompt of no tokens. A
// row's tokens are its first `begin` ones, its prompt, its others, and as many copies of its last one as it takes to be
// as long as the batch.
const std::string& prompt_source() {
  static const std::string source = row_source() + R"python(
def prompt_lengths(x: Tensor, prompt_length: Tensor, adapter_ids: Optional[Tensor], adapter: int,
                   why_equal: str) -> Tensor:
    check_ids("prompt_tuning", x, adapter_ids, prompt_length)
    lengths = present(prompt_length, adapter_ids, adapter)
    if lengths.size(0) == 0:
        lengths = torch.zeros([1], dtype=lengths.dtype, device=lengths.device)
    if len(why_equal) > 0:
        longest = int(lengths.max())
        shortest = int(lengths.min())
        assert longest == shortest, "prompt_tuning: expected rows with prompts of one length, got {} and {} tokens; " \
            "put them in batches of their own: {}".format(shortest, longest, why_equal)
    return lengths

def longest_prompt(lengths: Tensor) -> int:
    return int(lengths.max())

def own_tokens(x: Tensor, lengths: Tensor, added: int) -> Optional[Tensor]:
    own: Optional[Tensor] = None
    if int(lengths.min()) < added:
        at = torch.arange(added + x.size(1), device=x.device).unsqueeze(0)
        own = at.lt(lengths.unsqueeze(-1).add(x.size(1)))
    return own

def with_prompts(x: Tensor, prompt: Tensor, prompt_begin: Tensor, lengths: Tensor, added: int,
                 adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    if added == 0:
        return x
    prompts = selected(prompt, adapter_ids, adapter).narrow(1, 0, added).to(x.dtype)
    joined = torch.cat([prompts.expand(x.size(0), added, x.size(2)), x], 1)
    begin = selected(prompt_begin, adapter_ids, adapter).unsqueeze(-1)
    length = lengths.unsqueeze(-1)
    at = torch.arange(added + x.size(1), device=x.device).unsqueeze(0)
    behind = at.sub(length).add(added).clamp(max=added + x.size(1) - 1)
    index = torch.where(at.lt(begin), at.add(added), torch.where(at.lt(begin + length), at.sub(begin), behind))
    return joined.gather(1, index.unsqueeze(-1).expand(x.size(0), added + x.size(1), x.size(2)))
)python";
  return source;
}

}  // namespace

PromptInserter::PromptInserter(Inserter& inserter, const EmbeddingSite& site, const Slot& slot,
                               const torch::jit::Module& module)
    : inserter_(inserter), graph_(inserter.graph()), site_(site), slot_(slot), module_(module) {
  longer_.sequence_first = site.sequence_first;
  longer_.features = slot.parameters.at("prompt").size(-1);
  const std::string why_equal = why_not_unequal(graph_, module, {site.value, site.sequence_first, longer_.features});
  Node* maker = site.value->node();
  Node* end = inserter.marker_behind(maker->kind() == c10::prim::Param ? inserter.top() : maker);
  {
    WithInsertPoint guard(end);
    Value* x = inserter.swapped(site.value, site.sequence_first);
    Value* lengths = inserter.parameter(slot, inserter.slot_module(slot), "prompt_length");
    longer_.lengths = call("prompt_lengths",
                           {x, lengths, inserter.adapter_ids(), inserter.active(), graph_.insertConstant(why_equal)});
    longer_.added = call("longest_prompt", {longer_.lengths});
    longer_.own = why_equal.empty() ? call("own_tokens", {x, longer_.lengths, longer_.added}) : nullptr;
  }
  end->destroy();
}

Value* PromptInserter::call(const char* function, const std::vector<Value*>& arguments) {
  return torch::jit::insertGraph(graph_, *compile_graph(prompt_source(), function), arguments)[0];
}

void PromptInserter::finish() {
  longer_.before = inserter_.present_stream(site_.value);            // behind invertible adapters, as in the library
  Node* last = (longer_.own ? longer_.own : longer_.added)->node();  // invertible adapters stand before it
  Node* end = inserter_.marker_behind(last);
  {
    WithInsertPoint guard(end);
    Value* bank = inserter_.slot_module(slot_);
    Value* x = inserter_.swapped(longer_.before, site_.sequence_first);
    Value* joined = call("with_prompts", {x, inserter_.parameter(slot_, bank, "prompt"),
                                          inserter_.parameter(slot_, bank, "prompt_begin"), longer_.lengths,
                                          longer_.added, inserter_.adapter_ids(), inserter_.active()});
    Value* swapped = inserter_.swapped(joined, site_.sequence_first);
    longer_.tokens = site_.sequence_first ? graph_.insert(c10::aten::contiguous, {swapped}) : swapped;
  }
  longer_.before->replaceAllUsesAfterNodeWith(end, longer_.tokens);
  TORCH_INTERNAL_ASSERT(longer_.tokens->hasUses(), "nothing behind the embeddings reads the prompts");
  end->destroy();
  make_longer(graph_, module_, longer_, inserter_.adapter_ids());
}

}  // namespace torchgraft
