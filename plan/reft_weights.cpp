#include <torchgraft/plan/reft_weights.h>

#include <torchgraft/plan/draws.h>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace torchgraft {
namespace {

// The library's parameters of one unit, behind "units.<unit>.", and ours, before "_<unit>".
const std::map<std::string, std::string>& reft_names() {
  static const std::map<std::string, std::string> kNames = {
      {"learned_source.weight", "source_weight"},
      {"learned_source.bias", "source_bias"},
      {"projection.weight", "projection"},
      {"projection.parametrizations.weight.original", "original"},
      {"projection.parametrizations.weight.0.base", "base"},
  };
  return kNames;
}

std::string of_unit(const char* name, int64_t unit) { return std::string(name) + "_" + std::to_string(unit); }

// The sides of the orthogonal matrix whose first columns, or whose first rows, are the projection [r, H].
int64_t longer_side(const PlannedReft& planned) { return std::max(planned.config.r, planned.hidden_size); }

bool is_wide(const at::Tensor& matrix) { return matrix.size(-2) < matrix.size(-1); }

// -1 on the diagonal: the original of a projection that is the base's first rows or columns.
at::Tensor negative_eye(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return -at::eye(sizes[0], sizes[1], options);
}

// torch's _make_orthogonal: the Q of a QR decomposition whose R has a positive diagonal.
at::Tensor made_orthogonal(const at::Tensor& matrix) {
  const auto [reflectors, tau] = at::geqrf(matrix);
  return at::linalg_householder_product(reflectors, tau) * reflectors.diagonal(0, -2, -1).sgn().unsqueeze(-2);
}

// torch's _is_orthogonal.
bool is_orthogonal(const at::Tensor& matrix) {
  const int64_t n = matrix.size(-2);
  const at::Tensor identity = at::eye(matrix.size(-1), matrix.options());
  const double eps = 10.0 * static_cast<double>(n) * std::pow(2.0, matrix.scalar_type() == at::kDouble ? -52 : -23);
  return at::allclose(at::matmul(matrix.mT(), matrix), identity, /*rtol=*/1e-5, eps);
}

// A square matrix whose first columns are those of the orthogonalised `tall`, as right_inverse of torch's orthogonal
// completes it.
at::Tensor drawn_base(const at::Tensor& tall) {
  const int64_t n = tall.size(0);
  const int64_t k = tall.size(1);
  if (n == k) {
    return is_orthogonal(tall) ? tall.clone() : made_orthogonal(tall);
  }
  return made_orthogonal(at::cat({tall, at::randn({n, n - k}, tall.options())}, 1));
}

}  // namespace

std::map<std::string, std::vector<int64_t>> reft_shapes(const PlannedReft& planned) {
  const int64_t units = reft_units(planned.config);
  const std::vector<int64_t> matrix = {units, planned.config.r, planned.hidden_size};
  return {{"source_weight", matrix},
          {"source_bias", {units, planned.config.r}},
          {"projection", matrix},
          {"subtraction", {}},
          {"positions", {2}}};
}

void add_reft_constants(const PlannedReft& planned, ModuleWeights& weights) {
  const ReftConfig& config = planned.config;
  weights["positions"] = at::tensor({config.prefix_positions, config.suffix_positions}, at::kLong);
  weights["subtraction"] = at::scalar_tensor(config.subtract_projection ? 1.0 : 0.0, at::kDouble);
}

std::string reft_source(const PlannedModule& module) {
  return "layer_" + std::to_string(module.number) + "_" + module.site;
}

bool has_reft_sources(const PlannedModule& module, const Reparametrisation& sources) {
  const auto* reft = std::get_if<PlannedReft>(&module.method);
  return reft && reft->config.orthogonality && sources.count(reft_source(module)) > 0;
}

at::Tensor orthogonal_matrix(const at::Tensor& original, const at::Tensor& base) {
  const at::Tensor tall = is_wide(original) ? original.mT() : original;
  at::Tensor columns;
  if (tall.size(0) == tall.size(1)) {
    const at::Tensor lower = tall.tril();
    columns = at::linalg_matrix_exp(lower - lower.mT());
  } else {
    const at::Tensor reflectors = tall.tril(-1);
    const at::Tensor tau = 2.0 / (1.0 + (reflectors * reflectors).sum(-2));
    columns = at::linalg_householder_product(reflectors, tau) * tall.diagonal(0, -2, -1).to(at::kInt).unsqueeze(-2);
  }
  const at::Tensor result = at::matmul(base, columns);
  return is_wide(original) ? result.mT() : result;
}

at::Tensor reft_projection(const PlannedReft& planned, const ModuleWeights& sources) {
  at::NoGradGuard no_grad;
  std::vector<at::Tensor> units;
  for (int64_t unit = 0; unit < reft_units(planned.config); ++unit) {
    units.push_back(orthogonal_matrix(sources.at(of_unit("original", unit)), sources.at(of_unit("base", unit))));
  }
  return at::stack(units);
}

ModuleWeights reft_sources_of(const PlannedReft& planned, const at::Tensor& projection) {
  at::NoGradGuard no_grad;
  ModuleWeights sources;
  const int64_t n = longer_side(planned);
  for (int64_t unit = 0; unit < reft_units(planned.config); ++unit) {
    const at::Tensor matrix = projection[unit].detach().cpu();
    const at::Tensor tall = is_wide(matrix) ? matrix.mT() : matrix;
    at::Tensor base = tall.clone(at::MemoryFormat::Contiguous);
    if (tall.size(1) < n) {
      auto generator = at::make_generator<at::CPUGeneratorImpl>(1);
      const at::Tensor drawn = at::randn({n, n - tall.size(1)}, generator, at::TensorOptions(at::kDouble));
      const at::Tensor whole = made_orthogonal(at::cat({tall.to(at::kDouble), drawn}, 1)).to(tall.scalar_type());
      base = at::cat({base, whole.narrow(1, tall.size(1), n - tall.size(1))}, 1);
    }
    sources[of_unit("original", unit)] = negative_eye(matrix.sizes(), matrix.options()).to(projection.device());
    sources[of_unit("base", unit)] = base.to(projection.device());
  }
  return sources;
}

ModuleWeights init_reft(const PlannedReft& planned, ModuleWeights& sources) {
  const ReftConfig& config = planned.config;
  const int64_t hidden = planned.hidden_size;
  std::vector<at::Tensor> weights;
  std::vector<at::Tensor> biases;
  std::vector<at::Tensor> projections;
  for (int64_t unit = 0; unit < reft_units(config); ++unit) {
    fix_seed(config.init_weights_seed);  // every unit starts from the seed
    weights.push_back(linear_weight(config.r, hidden));
    biases.push_back(linear_bias(config.r, hidden));
    projections.push_back(linear_weight(config.r, hidden));
    if (config.orthogonality) {
      const at::Tensor& matrix = projections.back();
      at::Tensor& base = sources[of_unit("base", unit)];
      base = drawn_base(is_wide(matrix) ? matrix.mT() : matrix);
      sources[of_unit("original", unit)] = negative_eye(matrix.sizes(), matrix.options());
    }
  }
  ModuleWeights result = {{"source_weight", at::stack(weights)}, {"source_bias", at::stack(biases)}};
  result["projection"] = config.orthogonality ? reft_projection(planned, sources) : at::stack(projections);
  add_reft_constants(planned, result);
  return result;
}

ModuleWeights read_reft(const PlannedReft& planned, const TakeTensor& take, ModuleWeights& sources) {
  const ReftConfig& config = planned.config;
  const int64_t n = longer_side(planned);
  std::vector<at::Tensor> weights;
  std::vector<at::Tensor> biases;
  std::vector<at::Tensor> projections;
  for (int64_t unit = 0; unit < reft_units(config); ++unit) {
    weights.push_back(take(of_unit("source_weight", unit), {config.r, planned.hidden_size}));
    biases.push_back(take(of_unit("source_bias", unit), {config.r}));
    if (!config.orthogonality) {
      projections.push_back(take(of_unit("projection", unit), {config.r, planned.hidden_size}));
      continue;
    }
    // Computed in float32 or wider.
    const auto wide = [&](const char* name, at::IntArrayRef sizes) {
      const at::Tensor saved = take(of_unit(name, unit), sizes);
      return saved.to(c10::promoteTypes(saved.scalar_type(), at::kFloat));
    };
    sources[of_unit("original", unit)] = wide("original", {config.r, planned.hidden_size});
    sources[of_unit("base", unit)] = wide("base", {n, n});
  }
  ModuleWeights result = {{"source_weight", at::stack(weights)}, {"source_bias", at::stack(biases)}};
  result["projection"] = config.orthogonality ? reft_projection(planned, sources) : at::stack(projections);
  add_reft_constants(planned, result);
  return result;
}

StateDict reft_state(const PlannedReft& planned, const ModuleWeights& weights, const ModuleWeights& sources) {
  const ModuleWeights kept =
      planned.config.orthogonality && sources.empty() ? reft_sources_of(planned, weights.at("projection")) : sources;
  StateDict result;
  for (int64_t unit = 0; unit < reft_units(planned.config); ++unit) {
    for (const auto& [saved, name] : reft_names()) {
      const std::string key = "units." + std::to_string(unit) + "." + saved;
      const bool is_source = name == "original" || name == "base";
      if (is_source && planned.config.orthogonality) {
        result[key] = kept.at(of_unit(name.c_str(), unit));
      } else if (!is_source && (name != "projection" || !planned.config.orthogonality)) {
        result[key] = weights.at(name)[unit];
      }
    }
  }
  return result;
}

std::string reft_parameter_name(const std::string& saved) {
  for (const int64_t unit : {0, 1}) {
    const std::string prefix = "units." + std::to_string(unit) + ".";
    if (saved.starts_with(prefix)) {
      const auto found = reft_names().find(saved.substr(prefix.size()));
      return found == reft_names().end() ? "" : of_unit(found->second.c_str(), unit);
    }
  }
  return "";
}

}  // namespace torchgraft
