#include "structures.h"
#include "support.h"

#include <torchgraft/plan/reft_weights.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::bert_like;
using testing::error_of;

PlannedReft planned(int64_t r, int64_t hidden, bool tied = false) {
  PlannedReft result{loreft_config(), hidden};
  result.config.r = r;
  result.config.tied_weights = tied;
  return result;
}

// Wider than high, square, and higher than wide.
const std::vector<std::pair<int64_t, int64_t>> kSizes = {{2, 7}, {1, 5}, {5, 5}, {6, 4}};

TEST(ReftWeights, AFreshProjectionIsOrthogonal) {
  for (const auto& [r, hidden] : kSizes) {
    ModuleWeights sources;
    const at::Tensor projection = init_reft(planned(r, hidden), sources).at("projection");
    ASSERT_EQ(projection.sizes(), at::IntArrayRef({2, r, hidden}));
    for (const int64_t unit : {0, 1}) {
      const at::Tensor tall = r < hidden ? projection[unit].t() : projection[unit];
      EXPECT_TRUE(at::allclose(at::matmul(tall.t(), tall), at::eye(tall.size(1)), 1e-5, 1e-5)) << r << " " << hidden;
    }
    EXPECT_EQ(sources.size(), 4u);
  }
}

// Exactly: a directory that was frozen and saved gives the same numbers. Also where rows are not orthonormal: a mean.
TEST(ReftWeights, SourcesOfAProjectionGiveItBackBitForBit) {
  for (const auto& [r, hidden] : kSizes) {
    for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
      const PlannedReft reft = planned(r, hidden, /*tied=*/true);
      ModuleWeights drawn;
      const at::Tensor orthogonal = init_reft(reft, drawn).at("projection").to(dtype);
      for (const at::Tensor& projection : {orthogonal, at::randn({1, r, hidden}, dtype)}) {
        const ModuleWeights sources = reft_sources_of(reft, projection);
        EXPECT_TRUE(at::equal(reft_projection(reft, sources), projection)) << r << " " << hidden;
      }
    }
  }
}

TEST(ReftWeights, NamesOfTheLibraryAndOursAreOneToOne) {
  const PlannedReft reft = planned(2, 7);
  ModuleWeights sources;
  const ModuleWeights weights = init_reft(reft, sources);
  std::map<std::string, at::Tensor> taken;
  for (const auto& [saved, tensor] : reft_state(reft, weights, sources)) {
    taken[reft_parameter_name(saved)] = tensor;
  }
  ModuleWeights read_sources;
  const ModuleWeights read =
      read_reft(reft, [&](const std::string& name, at::IntArrayRef) { return taken.at(name); }, read_sources);
  for (const auto& [name, tensor] : weights) {
    EXPECT_TRUE(at::equal(read.at(name), tensor)) << name;
  }
  EXPECT_EQ(reft_parameter_name("units.2.learned_source.weight"), "");
  EXPECT_EQ(reft_parameter_name("units.0.learned_source.scale"), "");
}

TEST(ReftWeights, ThePlanHasTheLayersThatTheConfigurationNames) {
  Structure structure = bert_like(3);
  for (Layer& layer : structure.layers) {
    layer.has_end = layer.index != 1;
    layer.end_note = layer.has_end ? "" : "it goes on for ever";
  }
  ReftConfig config = loreft_config();
  const std::string error = error_of([&] { make_plan(structure, AdapterConfig{{config}}); });
  EXPECT_NE(error.find("ReFT cannot act on layer 1: it goes on for ever; leave the layer out"), std::string::npos)
      << error;
  config.layers = std::vector<int64_t>{0, 2};
  const Plan plan = make_plan(structure, AdapterConfig{{config}});
  ASSERT_EQ(plan.size(), 2u);
  EXPECT_EQ(plan[1].layer, 2);
  EXPECT_EQ(plan[1].site, "output_reft");
}

}  // namespace
}  // namespace torchgraft
