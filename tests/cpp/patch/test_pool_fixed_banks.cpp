#include "adapter_folder.h"

#include <torchgraft/config/gate_pooling.h>

#include <gtest/gtest.h>

#include <algorithm>

// Pools whose banks stay as they were made: the tensors are in others' hands.
namespace torchgraft {
namespace {

using testing::encoder;
using testing::error_of;
using testing::largest_difference;
using testing::made_of;
using testing::run_rows;

AdapterPoolOptions fixed(const std::vector<std::string>& room) {
  AdapterPoolOptions options;
  options.capacity = 3;
  std::transform(room.begin(), room.end(), std::back_inserter(options.room), config_from_string);
  options.fixed_banks = true;
  options.max_compositions = 0;
  return options;
}

std::string misfit(const AdapterPool& pool, const std::string& config) {
  return pool.misfit(config_from_string(config));
}

std::map<std::string, const void*> memory_of(const torch::jit::Module& module) {
  std::map<std::string, const void*> memory;
  for (const auto& buffer : module.named_buffers()) {
    memory[buffer.name] = buffer.value.data_ptr();
  }
  return memory;
}

TEST(PoolFixedBanks, AMisfitSaysWhatIsMissing) {
  const AdapterPool pool(encoder(), fixed({"lora[r=4, use_gating=True]", "seq_bn"}));
  EXPECT_EQ(misfit(pool, "lora[r=4]"), "");
  AdapterConfig gated = config_from_string("lora[r=2, use_gating=True]");
  EXPECT_EQ(pool.misfit(gated), "");
  gated.gate_pooling = kUnpaddedTokens;
  EXPECT_EQ(pool.misfit(gated), "no gates over unpadded tokens");
  EXPECT_EQ(misfit(pool, "lora[r=4, output_lora=True]"), "no bank for layer_0.output_lora");
  EXPECT_EQ(misfit(pool, "lora[r=5]"),
            "no room for lora_a [5, 12] in the bank of layer_0.selfattn_lora_q, which has [4, 12]");
  EXPECT_EQ(misfit(pool, "seq_bn[use_gating=True]"), "no gate_bias in the bank of layer_0.output_adapter_seq_ln_relu");
  // What the model itself has no place for is an error, in a pool of any room.
  EXPECT_NE(error_of([&] { misfit(pool, "seq_bn[mh_adapter=False, output_adapter=False, cross_adapter=True]"); }), "");
}

TEST(PoolFixedBanks, WhatDoesNotFitIsRefusedAndTheTensorsStay) {
  AdapterPool pool(encoder(), fixed({"lora[r=4]"}));
  const auto before = memory_of(pool.acquire({}).module());
  ASSERT_FALSE(before.empty());
  const AdapterSpec small = made_of("lora[r=2]", "small");
  pool.insert(small);
  EXPECT_EQ(error_of([&] { pool.insert(made_of("lora[r=8]", "wide")); }),
            "AdapterPool: 'wide' does not fit into the banks, which are fixed: no room for lora_a [8, 12] in the bank "
            "of layer_0.selfattn_lora_q, which has [4, 12]; make them for its configuration, too (room)");
  EXPECT_EQ(pool.resident(), std::vector<std::string>{"small"});
  EXPECT_EQ(pool.stats().rebuilds, 0);
  pool.insert(made_of("lora[r=4]", "other"));
  pool.evict("other");
  const auto lease = pool.acquire({"small"});
  EXPECT_EQ(memory_of(lease.module()), before);
  const at::Tensor x = at::randn({1, 5, 12});
  at::NoGradGuard no_grad;
  const at::Tensor alone = graft(encoder(), {small}).forward({x}).toTensor();
  EXPECT_LT(largest_difference(run_rows(lease.module(), x, lease.ids()), alone), 1e-5);
}

TEST(PoolFixedBanks, CompositionsAreRefusedWithTheReason) {
  AdapterPoolOptions options = fixed({"lora[r=4]"});
  AdapterPool pool(encoder(), options);
  pool.insert(made_of("lora[r=4]", "a"));
  pool.insert(made_of("lora[r=4]", "b"));
  const std::string refused = error_of([&] { pool.compose("both", composition_from_string("Average(a, b)")); });
  EXPECT_NE(refused.find("its banks are fixed"), std::string::npos) << refused;
  options.max_compositions = 2;
  EXPECT_EQ(error_of([&] { AdapterPool(encoder(), options); }),
            "AdapterPool: expected max_compositions of 0 with fixed_banks: a composition of another structure needs "
            "another module, got 2; set one of the two");
}

}  // namespace
}  // namespace torchgraft
