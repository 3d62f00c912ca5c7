#pragma once

#include <torchgraft/plan/checkpoint.h>
#include <torchgraft/plan/module_weights.h>
#include <torchgraft/plan/plan.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace torchgraft {

// The weights of ReFT, see module_weights.h. The library keeps an orthogonal projection as what torch.nn.utils.
// parametrizations.orthogonal computes it from: "original_<unit>", which is trained, and "base_<unit>". An adapter that
// is trained keeps both among its sources, under reft_source(); another keeps the projection alone.

std::map<std::string, std::vector<int64_t>> reft_shapes(const PlannedReft& planned);

// What the configuration says and no checkpoint has: "positions" (int64) and "subtraction".
void add_reft_constants(const PlannedReft& planned, ModuleWeights& weights);

// The source of an orthogonal projection: "layer_0_output_reft".
std::string reft_source(const PlannedModule& module);

// Whether `sources` has what the projection of `module`, an orthogonal ReFT, is computed from.
bool has_reft_sources(const PlannedModule& module, const Reparametrisation& sources);

// The projection [U, r, H] of these sources, or of a unit's original and base. As in torch.
at::Tensor reft_projection(const PlannedReft& planned, const ModuleWeights& sources);
at::Tensor orthogonal_matrix(const at::Tensor& original, const at::Tensor& base);

// Sources that give `projection` [U, r, H] bit for bit, also one whose rows are not orthonormal.
ModuleWeights reft_sources_of(const PlannedReft& planned, const at::Tensor& projection);

// The library's initial weights, draw for draw. `sources` gets those of an orthogonal projection.
ModuleWeights init_reft(const PlannedReft& planned, ModuleWeights& sources);

// What a checkpoint holds. take(name, shape) returns the saved tensor of that name: "source_weight_0", "source_bias_0",
// and "projection_0" or "original_0" and "base_0".
using TakeTensor = std::function<at::Tensor(const std::string& name, at::IntArrayRef shape)>;
ModuleWeights read_reft(const PlannedReft& planned, const TakeTensor& take, ModuleWeights& sources);

// The tensors that the library saves, by the library's names behind the adapter's: "units.0.learned_source.weight".
StateDict reft_state(const PlannedReft& planned, const ModuleWeights& weights, const ModuleWeights& sources);

// Our name of a saved parameter of ReFT, as in SavedParameters; empty when it is none.
std::string reft_parameter_name(const std::string& saved);

}  // namespace torchgraft
