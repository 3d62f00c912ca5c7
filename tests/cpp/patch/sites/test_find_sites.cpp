#include "encoder.h"

#include <torchgraft/patch/graft.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::encoder;
using testing::make_module;

TEST(FindSites, DescribesEveryLayer) {
  const Structure structure = inspect(encoder(3));
  ASSERT_EQ(structure.layers.size(), 3u);
  EXPECT_TRUE(structure.near_misses.empty());
  for (size_t i = 0; i < 3; ++i) {
    const Layer& layer = structure.layers[i];
    const std::string prefix = "layer" + std::to_string(i) + ".";
    EXPECT_EQ(layer.index, static_cast<int64_t>(i));
    EXPECT_EQ(layer.kind, AttentionKind::kSelf);
    EXPECT_EQ(layer.num_heads, 3);
    EXPECT_EQ(layer.num_kv_heads, 3);
    EXPECT_EQ(layer.head_dim, 4);
    EXPECT_EQ(layer.hidden_size, 12);
    EXPECT_EQ(layer.norm_order, NormOrder::kPost);
    EXPECT_TRUE(layer.has_attention_mask);
    EXPECT_EQ(layer.query->path, prefix + "q");
    EXPECT_EQ(layer.key->path, prefix + "k");
    EXPECT_EQ(layer.value->path, prefix + "v");
    EXPECT_EQ(layer.output->path, prefix + "o");
    EXPECT_EQ(layer.ffn_in->path, prefix + "up");
    EXPECT_EQ(layer.ffn_in->out_features, 20);
    EXPECT_EQ(layer.ffn_out->path, prefix + "down");
    EXPECT_TRUE(layer.notes.empty());
  }
}

// One attention over x [B, S, 12]. `heads` cuts q, k and v out of `y`, the result of a packed projection.
Structure packed(const std::string& heads) {
  return inspect(make_module({{"qkv", at::randn({36, 12})}, {"o", at::randn({12, 12})}},
                             "def forward(self, x: Tensor) -> Tensor:\n"
                             "    y = torch.linear(x, self.qkv)\n" +
                                 heads +
                                 "    z = torch.scaled_dot_product_attention(q, k, v)\n"
                                 "    return torch.linear(z.transpose(1, 2).flatten(2), self.o)\n"));
}

void expect_columns(const Structure& structure) {
  ASSERT_EQ(structure.layers.size(), 1u) << structure.near_misses.front();
  const Layer& layer = structure.layers[0];
  int64_t offset = 0;
  for (const auto& projection : {layer.query, layer.key, layer.value}) {
    EXPECT_TRUE(projection->packed);
    EXPECT_EQ(projection->offset, offset);
    EXPECT_EQ(projection->out_features, 12);
    offset += 12;
  }
}

TEST(FindSites, ColumnsOfAChunkedProjectionAreFound) {
  expect_columns(packed("    q, k, v = y.view(x.size(0), x.size(1), 9, 4).transpose(1, 2).chunk(3, 1)\n"));
}

TEST(FindSites, ColumnsOfAnUnboundProjectionAreFound) {
  expect_columns(packed("    q, k, v = y.view(x.size(0), x.size(1), 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)\n"));
}

TEST(FindSites, ColumnsOfASelectedProjectionAreFound) {
  expect_columns(
      packed("    p = y.view(x.size(0), x.size(1), 3, 3, 4).permute(2, 0, 3, 1, 4)\n"
             "    q, k, v = p.select(0, 0), p.select(0, 1), p.select(0, 2)\n"));
}

TEST(FindSites, ColumnsThatLieHeadByHeadAreNoted) {
  const Structure structure = packed(
      "    p = y.view(x.size(0), x.size(1), 4, 3, 3).permute(3, 0, 2, 1, 4)\n"
      "    q, k, v = p.select(0, 0), p.select(0, 1), p.select(0, 2)\n");
  ASSERT_EQ(structure.layers.size(), 1u);
  EXPECT_EQ(structure.layers[0].key->offset, 12);
  EXPECT_NE(structure.layers[0].notes.at(0).find("the columns of qkv hold queries, keys and values head by head"),
            std::string::npos)
      << structure.layers[0].notes[0];
}

TEST(FindSites, AMissingResidualAddIsNoted) {
  const Structure structure = packed("    q, k, v = y.view(x.size(0), x.size(1), 9, 4).transpose(1, 2).chunk(3, 1)\n");
  ASSERT_EQ(structure.layers.size(), 1u);
  EXPECT_FALSE(structure.layers[0].has_attention_residual);
  ASSERT_EQ(structure.layers[0].notes.size(), 1u);
  EXPECT_EQ(structure.layers[0].notes[0], "no residual add follows o");
}

TEST(FindSites, AttentionInABranchWithoutItsProjectionsIsANearMiss) {
  const Structure structure = inspect(make_module({{"w", at::randn({12, 12})}}, R"python(
def forward(self, x: Tensor, flag: bool) -> Tensor:
    q = torch.linear(x, self.w).view(x.size(0), x.size(1), 3, 4).transpose(1, 2)
    if flag:
        q = torch.scaled_dot_product_attention(q, q, q)
    return q
)python"));
  EXPECT_TRUE(structure.layers.empty());
  ASSERT_EQ(structure.near_misses.size(), 1u);
  EXPECT_EQ(structure.near_misses[0],
            "at w: attention was left out: the projection of its query is inside another branch, or a loop");
}

}  // namespace
}  // namespace torchgraft
