#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// A size: a product of a number and symbols (batch, sequence, ...). Equal products are equal sizes.
struct Dim {
  int64_t factor = 1;
  std::vector<int> symbols;  // sorted

  bool is_constant() const { return symbols.empty(); }
  bool operator==(const Dim&) const = default;
  Dim operator*(const Dim& other) const;
  // This size divided by `divisor`; nullopt when `divisor` does not divide it.
  std::optional<Dim> divided_by(const Dim& divisor) const;
};

using Shape = std::vector<Dim>;

inline Dim number(int64_t factor) { return Dim{factor, {}}; }
Dim product(const Shape& shape);

// `dim` counted from the front; nullopt when it is no constant or out of range.
std::optional<size_t> position(const torch::jit::Value* dim, size_t rank);

// Works out the shapes of a graph's values on demand, as far as they follow without an input: the sizes of weights are
// numbers, others are symbols. A saved graph has no shapes, and recognisers must know which dimension is the batch.
//
// A linear map on a value of unknown shape is taken to see [a, b, features], an embedding to see [a, b], and a product
// of many matrices to have as many of each.
class SymbolicShapes {
 public:
  explicit SymbolicShapes(const torch::jit::Module& root) : root_(root) {}

  const torch::jit::Module& root() const { return root_; }

  // nullopt when the value is not a tensor or its rank cannot be known. An object that holds a packed weight has the
  // weight's shape.
  std::optional<Shape> shape(const torch::jit::Value* value);

  // The value of an int; a fresh symbol when the int is not understood.
  Dim integer(const torch::jit::Value* value);

  // The values of a list of ints; nullopt when the list is neither a constant nor one ListConstruct.
  std::optional<Shape> integers(const torch::jit::Value* list);

  // A symbol that stands for no other size yet.
  Dim fresh();

  // Takes a tensor of unknown shape to have this one from now on.
  void assume(const torch::jit::Value* value, const Shape& assumed);

  // Equates two sizes from now on. Returns false, and does nothing, unless both are single symbols.
  bool assume_equal(const Dim& a, const Dim& b);

  // Equates what two equal numbers of elements leave without their common factors, if that is one symbol each.
  void assume_equal_products(const Dim& a, const Dim& b);

  // `dim` with each symbol replaced by the one that it was equated with.
  Dim canonical(Dim dim) const;

 private:
  std::optional<Shape> compute(const torch::jit::Value* value);
  std::optional<Shape> of_packed(const torch::jit::Value* object);
  std::optional<Shape> of_projection(const torch::jit::Node* node);
  Shape assume_factor(const Shape& left, const torch::jit::Value* right);
  std::optional<Shape> of_embedding(const torch::jit::Node* node);
  std::optional<Shape> of_factory(const torch::jit::Node* node);
  std::optional<Shape> of_arithmetic(const torch::jit::Node* node);
  Dim compute_integer(const torch::jit::Value* value);

  const torch::jit::Module& root_;
  std::map<const torch::jit::Value*, std::optional<Shape>> shapes_;
  std::map<const torch::jit::Value*, Dim> integers_;
  std::map<int, int> same_as_;  // symbol -> the one that stands for it
  int next_symbol_ = 0;
};

}  // namespace torchgraft
