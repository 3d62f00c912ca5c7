#include "beam_search.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace {

constexpr double kNever = -1e9;  // the score of what is no candidate

struct Beam {
  Tokens tokens;
  double score = kNever;
};

std::vector<int64_t> top(const at::Tensor& scores, int64_t count) {
  const at::Tensor places = std::get<1>(scores.topk(count));
  return {places.data_ptr<int64_t>(), places.data_ptr<int64_t>() + count};
}

at::Tensor scores_of(const std::vector<Beam>& beams) {
  std::vector<float> scores;
  for (const Beam& beam : beams) {
    scores.push_back(static_cast<float>(beam.score));
  }
  return torch::tensor(scores);
}

// The search behind one prompt. Scores are sums of log probabilities, in float32.
class BeamSearch {
 public:
  BeamSearch(const GenerationOptions& generation, const BeamOptions& options)
      : generation_(generation), options_(options), running_(static_cast<size_t>(options.num_beams)) {
    running_.front().score = 0;  // all read the same prompt: only one of them counts
  }

  // Goes on with the logits [beams, vocabulary] behind each running beam. Afterwards beam i continues parents()[i].
  void advance(const at::Tensor& logits);

  bool is_done() const { return is_done_; }
  const std::vector<int64_t>& parents() const { return parents_; }
  int64_t last_token(size_t beam) const { return running_.at(beam).tokens.back(); }
  const Tokens& best() const { return ended_.front().tokens; }

 private:
  std::vector<Beam> candidates(const at::Tensor& logits, std::vector<int64_t>& parents) const;
  bool has_ended(const Beam& beam) const {
    return generation_.stop.count(beam.tokens.back()) > 0 ||
           static_cast<int64_t>(beam.tokens.size()) == generation_.max_new_tokens;
  }
  void keep_ended(const std::vector<Beam>& candidates);
  bool may_improve() const;

  const GenerationOptions& generation_;
  const BeamOptions& options_;
  std::vector<Beam> running_;
  std::vector<Beam> ended_;  // at most num_beams, the best first; their scores are divided by their lengths
  std::vector<int64_t> parents_;
  bool is_done_ = false;
};

// The likeliest continuations of all beams: so many that num_beams of them do not end in a stop token.
std::vector<Beam> BeamSearch::candidates(const at::Tensor& logits, std::vector<int64_t>& parents) const {
  const int64_t words = logits.size(1);
  const auto stops = static_cast<int64_t>(generation_.stop.size());
  const int64_t count = std::max<int64_t>(2, 1 + stops) * options_.num_beams;
  if (count > options_.num_beams * words) {
    throw std::runtime_error("expected fewer stop tokens than the vocabulary has words, got " + std::to_string(stops) +
                             " of " + std::to_string(words));
  }
  const at::Tensor scores =
      (logits.to(at::kFloat).log_softmax(-1) + scores_of(running_).unsqueeze(1)).flatten().contiguous();
  std::vector<Beam> result;
  for (const int64_t place : top(scores, count)) {
    Beam beam = running_.at(static_cast<size_t>(place / words));
    beam.tokens.push_back(place % words);
    beam.score = scores[place].item<float>();
    parents.push_back(place / words);
    result.push_back(std::move(beam));
  }
  return result;
}

void BeamSearch::advance(const at::Tensor& logits) {
  if (!logits.isfinite().any().item<bool>() || logits.isnan().any().item<bool>()) {
    throw std::runtime_error("no token can be chosen, the logits are not numbers");
  }
  std::vector<int64_t> parents;
  const std::vector<Beam> found = candidates(logits, parents);
  keep_ended(found);
  std::vector<Beam> next;
  parents_.clear();
  for (size_t i = 0; i < found.size() && next.size() < running_.size(); ++i) {
    if (!has_ended(found[i])) {
      next.push_back(found[i]);
      parents_.push_back(parents[i]);
    }
  }
  const bool is_full = static_cast<int64_t>(ended_.size()) == options_.num_beams;
  if (next.size() < running_.size() || (is_full && options_.early_stopping)) {
    is_done_ = true;  // at the most tokens, all candidates end
    return;
  }
  running_ = std::move(next);
  is_done_ = !may_improve();
}

// A sequence ends only if it is among the num_beams best candidates.
void BeamSearch::keep_ended(const std::vector<Beam>& candidates) {
  std::vector<Beam> all = ended_;
  for (int64_t i = 0; i < options_.num_beams; ++i) {
    Beam beam = candidates[static_cast<size_t>(i)];
    if (has_ended(beam)) {
      beam.score = static_cast<float>(beam.score) /
                   static_cast<float>(std::pow(static_cast<double>(beam.tokens.size()), options_.length_penalty));
      all.push_back(std::move(beam));
    }
  }
  if (all.empty()) {
    return;
  }
  std::vector<Beam> kept;
  for (const int64_t place :
       top(scores_of(all), std::min<int64_t>(options_.num_beams, static_cast<int64_t>(all.size())))) {
    kept.push_back(std::move(all[static_cast<size_t>(place)]));
  }
  ended_ = std::move(kept);
}

// Whether the best running beam, as it is, has a better score than the worst that has ended.
bool BeamSearch::may_improve() const {
  if (static_cast<int64_t>(ended_.size()) < options_.num_beams) {
    return true;
  }
  const double length = std::pow(static_cast<double>(running_.front().tokens.size()), options_.length_penalty);
  return static_cast<float>(running_.front().score) / static_cast<float>(length) >
         static_cast<float>(ended_.back().score);
}

}  // namespace

std::vector<Tokens> generate_by_beams(const Decoder& decoder, const std::vector<Tokens>& prompts,
                                      const GenerationOptions& options, const BeamOptions& beams) {
  const auto width = static_cast<size_t>(beams.num_beams);
  const PaddedPrompts padded = pad_prompts(prompts);
  DecoderState state = decoder.start(static_cast<int64_t>(prompts.size()), options.adapter_ids);
  at::Tensor logits = decoder.step(state, padded.ids, padded.real);
  std::vector<BeamSearch> searches(prompts.size(), BeamSearch(options, beams));
  std::vector<int64_t> rows;  // of the state: which one each beam of each search that goes on continues
  std::vector<size_t> active;
  for (size_t i = 0; i < prompts.size(); ++i) {
    rows.insert(rows.end(), width, static_cast<int64_t>(i));
    active.push_back(i);
  }
  logits = logits.index_select(0, torch::tensor(rows, torch::kLong));
  while (!active.empty()) {
    std::vector<size_t> next;
    std::vector<int64_t> next_rows;
    std::vector<int64_t> tokens;
    for (size_t place = 0; place < active.size(); ++place) {
      BeamSearch& search = searches[active[place]];
      const auto first = static_cast<int64_t>(place * width);
      search.advance(logits.narrow(0, first, beams.num_beams));
      if (search.is_done()) {
        continue;
      }
      next.push_back(active[place]);
      for (size_t beam = 0; beam < width; ++beam) {
        next_rows.push_back(rows[static_cast<size_t>(first + search.parents()[beam])]);
        tokens.push_back(search.last_token(beam));
      }
    }
    active = std::move(next);
    if (!active.empty()) {
      state = select_rows(state, next_rows);
      const at::Tensor ids = torch::tensor(tokens, torch::kLong).unsqueeze(1);
      logits = decoder.step(state, ids, torch::ones_like(ids, torch::kBool));
      rows.resize(next_rows.size());
      for (size_t row = 0; row < rows.size(); ++row) {
        rows[row] = static_cast<int64_t>(row);
      }
    }
  }
  std::vector<Tokens> result;
  for (const BeamSearch& search : searches) {
    result.push_back(search.best());
  }
  return result;
}
