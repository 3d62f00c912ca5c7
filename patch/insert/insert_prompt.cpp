#include <torchgraft/patch/insert/insert_prompt.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/insert/longer_tokens.h>
#include <torchgraft/patch/insert/row_functions.h>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

namespace {

// A row's tokens are its first `begin` ones, its prompt and its others. Those of the base have a prompt of no tokens.
const std::string& prompt_source() {
  static const std::string source = row_source() + R"python(
def prompt_tokens(x: Tensor, prompt_length: Tensor, adapter_ids: Optional[Tensor], adapter: int) -> int:
    check_ids("prompt_tuning", x, adapter_ids, prompt_length)
    lengths = present(prompt_length, adapter_ids, adapter)
    if lengths.size(0) == 0:
        return 0
    longest = int(lengths.max())
    shortest = int(lengths.min())
    assert longest == shortest, "prompt_tuning: expected rows with prompts of one length, got {} and {} tokens; put " \
        "them in batches of their own".format(shortest, longest)
    return longest

def with_prompts(x: Tensor, prompt: Tensor, prompt_begin: Tensor, added: int, adapter_ids: Optional[Tensor],
                 adapter: int) -> Tensor:
    if added == 0:
        return x
    prompts = selected(prompt, adapter_ids, adapter).narrow(1, 0, added).to(x.dtype)
    joined = torch.cat([prompts.expand(x.size(0), added, x.size(2)), x], 1)
    begin = selected(prompt_begin, adapter_ids, adapter).unsqueeze(-1)
    at = torch.arange(added + x.size(1), device=x.device).unsqueeze(0)
    inner = torch.where(at.lt(begin + added), at.sub(begin), at)
    index = torch.where(at.lt(begin), at.add(added), inner).unsqueeze(-1)
    return joined.gather(1, index.expand(x.size(0), added + x.size(1), x.size(2)))
)python";
  return source;
}

}  // namespace

void insert_prompt(Inserter& inserter, const EmbeddingSite& site, const Slot& slot, const torch::jit::Module& module) {
  torch::jit::Graph& graph = inserter.graph();
  const auto call = [&](const char* function, const std::vector<Value*>& arguments) {
    return torch::jit::insertGraph(graph, *compile_graph(prompt_source(), function), arguments)[0];
  };
  Value* stream = inserter.present_stream(site.value);  // behind invertible adapters, as in the library
  Node* maker = stream->node();
  Node* end = inserter.marker_behind(maker->kind() == c10::prim::Param ? inserter.top() : maker);
  LongerTokens longer;
  {
    WithInsertPoint guard(end);
    Value* bank = inserter.slot_module(slot);
    Value* x = inserter.swapped(stream, site.sequence_first);
    longer.added = call("prompt_tokens", {x, inserter.parameter(slot, bank, "prompt_length"), inserter.adapter_ids(),
                                          inserter.active()});
    Value* joined = call("with_prompts",
                         {x, inserter.parameter(slot, bank, "prompt"), inserter.parameter(slot, bank, "prompt_begin"),
                          longer.added, inserter.adapter_ids(), inserter.active()});
    Value* swapped = inserter.swapped(joined, site.sequence_first);
    longer.tokens = site.sequence_first ? graph.insert(c10::aten::contiguous, {swapped}) : swapped;
  }
  longer.sequence_first = site.sequence_first;
  longer.before = stream;
  longer.features = slot.parameters.at("prompt").size(-1);
  stream->replaceAllUsesAfterNodeWith(end, longer.tokens);
  end->destroy();
  make_longer(graph, module, longer, inserter.adapter_ids());
}

}  // namespace torchgraft
