#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// Tokenised texts with their classes, all int64.
struct Examples {
  at::Tensor input_ids;       // [n, S]
  at::Tensor attention_mask;  // [n, S], non-zero where a token is real
  at::Tensor labels;          // [n], 0 to classes - 1

  int64_t size() const { return labels.size(0); }

  // The rows `indices` ([B] int64), cut behind the last real token among them.
  Examples rows(const at::Tensor& indices) const;
};

// Throws c10::Error with the path and what is wrong: a missing tensor, another dtype or shape, no examples, a row
// without tokens, a label out of range.
Examples read_examples(const std::string& path, int64_t classes);

// (the rest, round(fraction * n) examples), drawn by `seed`. Throws c10::Error when one of them would be empty.
std::pair<Examples, Examples> split(const Examples& examples, double fraction, uint64_t seed);

// Throws c10::Error that names the classes without an example: a model trained on the others never chooses them.
void check_every_class(const Examples& training, const std::vector<std::string>& labels);
