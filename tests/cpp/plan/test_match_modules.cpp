// Checkpoints of models beyond BERT, with the keys that adapters==1.3.0 writes for them.
#include "structures.h"
#include "support.h"

#include <torchgraft/plan/adapter_weights.h>
#include <torchgraft/plan/match_modules.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::append;
using testing::attention_at;
using testing::attention_layer;
using testing::bart_like;
using testing::bert_like;
using testing::error_of;

LoRAConfig small_lora(std::vector<std::string> matrices = {"q"}) {
  LoRAConfig config;
  config.r = 2;
  config.attn_matrices = std::move(matrices);
  return config;
}

// A LoRA of rank 2 at `path`, whose lora_A is all `value`.
void put_lora(StateDict& state, const std::string& path, double value, int64_t in = 12, int64_t out = 12) {
  state[path + ".loras.t.lora_A"] = at::full({2, in}, value);
  state[path + ".loras.t.lora_B"] = at::zeros({out, 2});
}

// A bottleneck of size 6 at `path`, whose down bias is all `value`.
void put_bottleneck(StateDict& state, const std::string& path, double value) {
  state[path + ".adapters.t.adapter_down.0.weight"] = at::zeros({6, 12});
  state[path + ".adapters.t.adapter_down.0.bias"] = at::full({6}, value);
  state[path + ".adapters.t.adapter_up.weight"] = at::zeros({12, 6});
  state[path + ".adapters.t.adapter_up.bias"] = at::zeros({12});
}

// "layer:slot=value" of one parameter, for every module of the plan that has it.
std::vector<std::string> values(const Structure& structure, const AdapterConfig& config, const StateDict& state,
                                const std::string& parameter) {
  const Plan plan = make_plan(structure, config);
  const AdapterWeights weights = adapter_hub_weights(plan, structure, state, "t", at::kDouble);
  std::vector<std::string> result;
  for (size_t i = 0; i < plan.size(); ++i) {
    if (const auto found = weights.at(i).find(parameter); found != weights[i].end()) {
      const at::Tensor flat = found->second.flatten();
      EXPECT_TRUE(flat.eq(flat[0]).all().item<bool>());
      result.push_back(c10::str(plan[i].layer, ":", plan[i].site, "=", flat[0].item<double>()));
    }
  }
  return result;
}

using Values = std::vector<std::string>;

StateDict bart_loras() {
  StateDict state;
  for (int i = 0; i < 2; ++i) {
    put_lora(state, c10::str("encoder.layers.", i, ".self_attn.q_proj"), 10 + i);
    put_lora(state, c10::str("encoder.layers.", i, ".fc1"), 20 + i, 12, 20);
    put_lora(state, c10::str("decoder.layers.", i, ".self_attn.q_proj"), 30 + i);
    put_lora(state, c10::str("decoder.layers.", i, ".encoder_attn.q_proj"), 40 + i);
    put_lora(state, c10::str("decoder.layers.", i, ".fc1"), 50 + i, 12, 20);
  }
  return state;
}

const Values kBartLoras = {"0:selfattn_lora_q=10",   "0:intermediate_lora=20", "1:selfattn_lora_q=11",
                           "1:intermediate_lora=21", "2:selfattn_lora_q=30",   "3:crossattn_lora_q=40",
                           "3:intermediate_lora=50", "4:selfattn_lora_q=31",   "5:crossattn_lora_q=41",
                           "5:intermediate_lora=51"};

TEST(MatchModules, EncoderAndDecoderByPath) {
  LoRAConfig config = small_lora();
  config.intermediate_lora = true;
  EXPECT_EQ(values(bart_like(2), AdapterConfig{{config}}, bart_loras(), "lora_a"), kBartLoras);
  EXPECT_EQ(values(bart_like(2, "seq2seq.0.model."), AdapterConfig{{config}}, bart_loras(), "lora_a"), kBartLoras);
}

TEST(MatchModules, EncoderAndDecoderByNumber) {
  LoRAConfig config = small_lora();
  config.intermediate_lora = true;
  Structure structure = bart_like(2);
  for (Layer& layer : structure.layers) {
    for (auto* projection : {&layer.query, &layer.key, &layer.value, &layer.ffn_in, &layer.ffn_out}) {
      if (*projection) {
        (*projection)->path.clear();
      }
    }
  }
  EXPECT_EQ(values(structure, AdapterConfig{{config}}, bart_loras(), "lora_a"), kBartLoras);
}

TEST(MatchModules, BottlenecksOfADecoderLayer) {
  BnConfig config = double_seq_bn_config();
  config.reduction_factor = 2.0;
  config.cross_adapter = true;
  StateDict state;
  put_bottleneck(state, "encoder.layers.0.attention_adapters", 1);
  put_bottleneck(state, "encoder.layers.0.output_adapters", 2);
  put_bottleneck(state, "decoder.layers.0.attention_adapters", 3);
  put_bottleneck(state, "decoder.layers.0.cross_attention_adapters", 4);
  put_bottleneck(state, "decoder.layers.0.output_adapters", 5);
  EXPECT_EQ(
      values(bart_like(1), AdapterConfig{{config}}, state, "down_bias"),
      (Values{"0:mh_adapter=1", "0:output_adapter=2", "1:mh_adapter=3", "2:cross_adapter=4", "2:output_adapter=5"}));
}

TEST(MatchModules, GatesOfPrefixesInEveryAttention) {
  PrefixTuningConfig config;
  config.flat = config.use_gating = true;
  config.prefix_length = 1;
  StateDict state;
  double value = 1;
  for (const std::string path :
       {"encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"}) {
    state[path + ".prefix_tuning.prefix_gates.t.weight"] = at::full({1, 12}, value++);
    state[path + ".prefix_tuning.prefix_gates.t.bias"] = at::zeros({1});
  }
  for (const std::string location : {"encoder", "self", "cross"}) {
    const std::string parameter = c10::str("prefix_tunings.t.", location, "_prefix.control_trans");
    // Once in a layer, once at the root.
    state[c10::str("prefix_tuning.", parameter)] = at::full({1 * 2 * 12}, value);
    state[c10::str("encoder.layers.0.self_attn.prefix_tuning.pool.", parameter)] = at::full({1 * 2 * 12}, value++);
  }
  const AdapterConfig adapter{{config}};
  EXPECT_EQ(values(bart_like(1), adapter, state, "gate_weight"),
            (Values{"0:encoder_prefix=1", "1:self_prefix=2", "2:cross_prefix=3"}));
  EXPECT_EQ(values(bart_like(1), adapter, state, "prefix_key"),
            (Values{"0:encoder_prefix=4", "1:self_prefix=5", "2:cross_prefix=6"}));
  state["prefix_tuning.prefix_tunings.t.self_prefix.control_trans"] = at::zeros({24});
  EXPECT_NE(error_of([&] { values(bart_like(1), adapter, state, "prefix_key"); }).find("to be the same prefix"),
            std::string::npos);
}

// GPT-2: one LoRA for the packed projection, with a gate for each part.
TEST(MatchModules, PackedProjectionsAreCut) {
  const std::string path = "h.0.attn.c_attn";
  Structure packed;
  append(packed, attention_layer(AttentionKind::kSelf, {path, 12, 12, 0, true}, {path, 12, 12, 12, true},
                                 {path, 12, 12, 24, true}));
  LoRAConfig config = small_lora({"v", "q"});
  config.use_gating = true;
  const auto parts = [](at::IntArrayRef shape) { return at::cat({at::full(shape, 1.0), at::full(shape, 2.0)}); };
  StateDict state = {{path + ".loras.t.lora_A", parts({2, 12})},
                     {path + ".loras.t.lora_B", parts({12, 2})},
                     {path + ".loras.t.gate.weight", parts({1, 12})},
                     {path + ".loras.t.gate.bias", parts({1})}};
  for (const Structure& structure : {packed, bert_like(1)}) {  // by path, and by name
    for (const std::string parameter : {"lora_a", "lora_b", "gate_weight", "gate_bias"}) {
      EXPECT_EQ(values(structure, AdapterConfig{{config}}, state, parameter),
                (Values{"0:selfattn_lora_q=1", "0:selfattn_lora_v=2"}));
    }
  }
  state[path + ".loras.t.lora_A"] = at::zeros({5, 12});
  EXPECT_NE(error_of([&] {
              values(packed, AdapterConfig{{config}}, state, "lora_a");
            }).find("expected the rows of h.0.attn.c_attn.loras.t.lora_A to be a multiple of 2"),
            std::string::npos);
}

// The path says which projection it is, whatever its name.
TEST(MatchModules, ProjectionsOfAnyNameByPath) {
  Structure structure;
  append(structure, attention_layer(AttentionKind::kSelf, {"net.blocks.0.asks", 12, 12}, {"net.blocks.0.has", 12, 12},
                                    {"net.blocks.0.gives", 12, 12}));
  StateDict state;
  put_lora(state, "blocks.0.gives", 1);
  put_lora(state, "blocks.0.asks", 2);
  EXPECT_EQ(values(structure, AdapterConfig{{small_lora({"q", "v"})}}, state, "lora_a"),
            (Values{"0:selfattn_lora_q=2", "0:selfattn_lora_v=1"}));
}

// A number alone is no path: in nn.Sequential(embeddings, layer, layer) the first layer has number 1.
TEST(MatchModules, ForeignPathsGoByNumber) {
  Structure structure;
  append(structure, attention_at(AttentionKind::kSelf, "body.1.attention"));
  append(structure, attention_at(AttentionKind::kSelf, "body.2.attention"));
  StateDict state;
  put_lora(state, "encoder.layer.0.attention.self.query", 1);
  put_lora(state, "encoder.layer.1.attention.self.query", 2);
  EXPECT_EQ(values(structure, AdapterConfig{{small_lora()}}, state, "lora_a"),
            (Values{"0:selfattn_lora_q=1", "1:selfattn_lora_q=2"}));
}

TEST(MatchModules, LayersLeftOutKeepTheirNumbers) {
  LoRAConfig config = small_lora();
  config.leave_out = {0};
  StateDict state;
  put_lora(state, "layers.1.self_attn.q_proj", 1);
  EXPECT_EQ(values(bert_like(2), AdapterConfig{{config}}, state, "lora_a"), Values{"1:selfattn_lora_q=1"});
  put_lora(state, "layers.0.self_attn.q_proj", 0);
  EXPECT_NE(error_of([&] {
              values(bert_like(2), AdapterConfig{{config}}, state, "lora_a");
            }).find("the checkpoint has layers.0.self_attn.q_proj.loras.t.lora_A, for which"),
            std::string::npos);
}

TEST(MatchModules, RefusesWhatIsAmbiguous) {
  // ALBERT: all layers run one module, so its path is that of each.
  Structure shared;
  append(shared, attention_at(AttentionKind::kSelf, "groups.0.attention"));
  append(shared, attention_at(AttentionKind::kSelf, "groups.0.attention"));
  StateDict state;
  put_lora(state, "groups.0.attention.q_proj", 1);
  EXPECT_NE(error_of([&] {
              values(shared, AdapterConfig{{small_lora()}}, state, "lora_a");
            }).find("could be for selfattn_lora_q of layer 0 and for selfattn_lora_q of layer 1"),
            std::string::npos);
  // A model of one stack, a checkpoint of two.
  Structure one_stack;
  append(one_stack, attention_at(AttentionKind::kSelf, "layers.0.self_attn"));
  const auto error_of_two_stacks = [&](const std::string& first, const std::string& second) {
    StateDict two_stacks;
    put_lora(two_stacks, first + ".layers.0.self_attn.q_proj", 1);
    put_lora(two_stacks, second + ".layers.0.self_attn.q_proj", 2);
    return error_of([&] { values(one_stack, AdapterConfig{{small_lora()}}, two_stacks, "lora_a"); });
  };
  EXPECT_NE(error_of_two_stacks("left", "right").find("are both for selfattn_lora_q of layer 0"), std::string::npos);
  EXPECT_NE(error_of_two_stacks("encoder", "decoder").find("say so: part=\"encoder\""), std::string::npos);
}

TEST(MatchModules, AnUnknownNameListsThoseThatAreThere) {
  StateDict state;
  put_lora(state, "layers.0.self_attn.q_proj", 1);
  const Plan plan = make_plan(bert_like(1), AdapterConfig{{small_lora()}});
  EXPECT_NE(error_of([&] {
              adapter_hub_weights(plan, bert_like(1), state, "task", at::kFloat);
            }).find("the checkpoint holds the adapters: t"),
            std::string::npos);
}

// A prefix is computed in float32, however coarse the model's type: only its result is rounded.
TEST(MatchModules, PrefixesAreComputedInFloat) {
  PrefixTuningConfig config;
  config.prefix_length = 3;
  config.bottleneck_size = 7;
  const std::string path = "prefix_tuning.prefix_tunings.t.self_prefix.";
  at::manual_seed(0);
  const StateDict state = {{path + "wte.weight", at::randn({3, 12})},
                           {path + "control_trans.0.weight", at::randn({7, 12})},
                           {path + "control_trans.0.bias", at::randn({7})},
                           {path + "control_trans.2.weight", at::randn({24, 7})},
                           {path + "control_trans.2.bias", at::randn({24})}};
  const Structure structure = bert_like(1);
  const Plan plan = make_plan(structure, AdapterConfig{{config}});
  const auto read = [&](at::ScalarType type) { return adapter_hub_weights(plan, structure, state, "t", type).at(0); };
  const at::Tensor coarse = read(at::kBFloat16).at("prefix_value");
  EXPECT_EQ(coarse.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(coarse, read(at::kFloat).at("prefix_value").to(at::kBFloat16)));
}

std::vector<std::string> sites_of(const std::string& path) {
  std::vector<std::string> result;
  for (const auto& [position, site] : lora_sites_by_number(bert_like(2), path)) {
    result.push_back(c10::str(position, ":", site));
  }
  return result;
}

TEST(LoraSitesByNumber, TakesWhatEndsAnAttentionForItsOutput) {
  const Values output = {"1:selfattn_lora_o"};
  for (const char* path : {"layers.1.attention.wo", "layers.1.attn.output_proj",
                           "encoder.layer.1.attention.output.dense", "h.1.attn.c_proj", "layers.1.self_attn.o_proj"}) {
    EXPECT_EQ(sites_of(path), output) << path;
  }
}

TEST(LoraSitesByNumber, TakesTheEndOfAFeedForwardBlockOutsideOfAttentionsOnly) {
  const Values output = {"1:output_lora"};
  for (const char* path : {"block.1.layer.1.DenseReluDense.wo", "encoder.layer.1.output.dense", "h.1.mlp.c_proj",
                           "attention_stack.layers.1.linear2"}) {
    EXPECT_EQ(sites_of(path), output) << path;
  }
  EXPECT_EQ(sites_of("layers.1.attention.linear2"), Values());
  EXPECT_EQ(sites_of("layers.1.attn.intermediate.dense2"), Values());
}

TEST(LoraSitesByNumber, RefusesTwoTowers) {
  Structure towers = bert_like(4);
  towers.layers[2].stack = towers.layers[3].stack = 1;
  const std::string error = error_of([&] { lora_sites_by_number(towers, "vision_model.layers.0.q_proj"); });
  EXPECT_NE(error.find("vision_model.layers.0.q_proj is matched by the number of its layer"), std::string::npos)
      << error;
  EXPECT_NE(error.find("several stacks of layers"), std::string::npos) << error;
  Structure both = bart_like(2);
  for (Layer& layer : both.layers) {
    layer.stack = layer.kind == AttentionKind::kEncoder ? 0 : 1;
  }
  EXPECT_FALSE(lora_sites_by_number(both, "decoder.layers.0.self_attn.q_proj").empty());
}

}  // namespace
}  // namespace torchgraft
