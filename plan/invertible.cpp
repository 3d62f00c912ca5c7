#include <torchgraft/plan/invertible.h>

namespace torchgraft {

std::map<std::string, std::vector<int64_t>> invertible_shapes(const PlannedInvertible& planned) {
  const int64_t first = planned.embedding_size / 2;
  const int64_t second = planned.embedding_size - first;
  return {{"f_down_weight", {planned.f_size, second}}, {"f_down_bias", {planned.f_size}},
          {"f_up_weight", {first, planned.f_size}},    {"f_up_bias", {first}},
          {"g_down_weight", {planned.g_size, first}},  {"g_down_bias", {planned.g_size}},
          {"g_up_weight", {second, planned.g_size}},   {"g_up_bias", {second}}};
}

const std::map<std::string, std::string>& invertible_names() {
  static const std::map<std::string, std::string> kNames = {
      {"f_down_weight", "F.0.weight"}, {"f_down_bias", "F.0.bias"},     {"f_up_weight", "F.2.weight"},
      {"f_up_bias", "F.2.bias"},       {"g_down_weight", "G.0.weight"}, {"g_down_bias", "G.0.bias"},
      {"g_up_weight", "G.2.weight"},   {"g_up_bias", "G.2.bias"}};
  return kNames;
}

}  // namespace torchgraft
