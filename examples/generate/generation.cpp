#include "generation.h"

#include <torch/torch.h>

#include <algorithm>

namespace {

constexpr int64_t kPadding = 0;  // any id: the mask hides it

}  // namespace

PaddedPrompts pad_prompts(const std::vector<Tokens>& prompts) {
  const auto rows = static_cast<int64_t>(prompts.size());
  size_t width = 0;
  for (const Tokens& prompt : prompts) {
    width = std::max(width, prompt.size());
  }
  const at::Tensor ids = torch::full({rows, static_cast<int64_t>(width)}, kPadding, torch::kLong);
  const at::Tensor real = torch::zeros({rows, static_cast<int64_t>(width)}, torch::kBool);
  for (int64_t row = 0; row < rows; ++row) {
    const auto begin = static_cast<int64_t>(width - prompts[row].size());
    ids[row].slice(0, begin).copy_(torch::tensor(prompts[row], torch::kLong));
    real[row].slice(0, begin).fill_(true);
  }
  return {ids, real};
}

std::vector<Tokens> generate(const Decoder& decoder, const std::vector<Tokens>& prompts,
                             const GenerationOptions& options, const OnToken& on_token) {
  const auto rows = static_cast<int64_t>(prompts.size());
  auto [ids, real] = pad_prompts(prompts);
  DecoderState state = decoder.start(rows, options.adapter_ids);
  Sampler sampler(options.sampling, rows);
  std::vector<Tokens> result(prompts.size());
  std::vector<bool> is_done(prompts.size(), false);
  for (int64_t count = 0; count < options.max_new_tokens; ++count) {
    const at::Tensor logits = decoder.step(state, ids, real);
    ids = torch::full({rows, 1}, kPadding, torch::kLong);
    real = torch::zeros({rows, 1}, torch::kBool);  // a sequence that has ended goes on as padding
    for (int64_t row = 0; row < rows; ++row) {
      if (is_done[row]) {
        continue;
      }
      const int64_t token = sampler.choose(row, logits[row]);
      result[row].push_back(token);
      on_token(row, token);
      is_done[row] = options.stop.count(token) > 0;
      ids[row][0] = token;
      real[row][0] = true;
    }
    if (std::all_of(is_done.begin(), is_done.end(), [](bool done) { return done; })) {
      break;
    }
  }
  return result;
}
