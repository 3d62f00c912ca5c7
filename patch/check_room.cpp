#include <torchgraft/patch/check_room.h>

#include <torchgraft/patch/adapters/dora.h>
#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/pool/row_size.h>
#include <torchgraft/plan/saved_config.h>

namespace torchgraft {
namespace {

// `size`, grown for adapters of `config`. Throws c10::Error when they do not fit the draft's model, or the limit.
RowSize grown(RowSize size, const AdapterConfig& config, const Draft& draft, int64_t limit) {
  check_supported(config);
  const AdapterSpec spec{"room", ejected_config(config), std::nullopt, ""};
  check_least_bytes(make_plan(draft.sites.structure, spec.config), draft.weights, limit);
  Adapter adapter = make_adapter(spec, draft.sites.structure, draft.weights);
  complete_dora(adapter, draft.sites, draft.module);
  size.add(adapter);
  check_row_limit(size.bytes(), limit);
  return size;
}

}  // namespace

std::vector<std::string> check_room(const torch::jit::Module& module, const AdapterPoolOptions& options) {
  const Draft draft = open_draft(module, options.graft);
  RowSize size;
  for (const Adapter& own : draft.adapters) {
    size = grown(std::move(size), own.config, draft, /*limit=*/0);
  }
  std::vector<std::string> faults;
  for (const AdapterConfig& config : options.room) {
    try {
      size = grown(size, config, draft, options.max_row_bytes);
      faults.emplace_back();
    } catch (const c10::Error& error) {
      faults.emplace_back(error.what_without_backtrace());
    }
  }
  return faults;
}

}  // namespace torchgraft
