#pragma once

#include "decoder.h"
#include "generation.h"
#include "prompts.h"

#include <cstdint>
#include <vector>

struct BeamOptions {
  int64_t num_beams = 1;
  double length_penalty = 1.0;  // a score is divided by the number of new tokens to this power
  bool early_stopping = false;  // end as soon as num_beams sequences have ended; else when no better one can come
};

// The best sequence that beam search finds behind each prompt: its new tokens. The search is that of transformers'
// generate(num_beams=..., length_penalty=..., early_stopping=...); sampling is ignored. Throws std::runtime_error.
std::vector<Tokens> generate_by_beams(const Decoder& decoder, const std::vector<Tokens>& prompts,
                                      const GenerationOptions& options, const BeamOptions& beams);
