#include <ATen/ATen.h>
#include <c10/core/SymBool.h>
#include <torchgraft/activations/activation.h>
#include <torchgraft/ops/check.h>

#include <initializer_list>
#include <sstream>

namespace torchgraft::ops {
namespace {

// One dimension of an expected shape: a known size, or a letter that any size fits.
class Dim {
 public:
  Dim(const char* letter) : letter_(letter) {}       // NOLINT(google-explicit-constructor)
  Dim(c10::SymInt size) : size_(std::move(size)) {}  // NOLINT(google-explicit-constructor)
  bool is_known() const { return letter_ == nullptr; }
  const c10::SymInt& size() const { return size_; }
  friend std::ostream& operator<<(std::ostream& stream, const Dim& dim) {
    return dim.is_known() ? stream << dim.size_ : stream << dim.letter_;
  }

 private:
  const char* letter_ = nullptr;
  c10::SymInt size_ = 0;
};

std::string spell(std::initializer_list<Dim> dims) {
  std::ostringstream text;
  text << "[";
  const char* separator = "";
  for (const Dim& dim : dims) {
    text << separator << dim;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

// Checks of one operator's arguments against its `x`.
class Checker {
 public:
  template <typename Arguments>
  explicit Checker(const Arguments& args) : op_(Arguments::kOperator), x_(args.x) {}

  void shape(const char* name, const at::Tensor& tensor, std::initializer_list<Dim> expected) const {
    TORCH_CHECK(tensor.dim() == static_cast<int64_t>(expected.size()), op_, ": expected ", name, " of shape ",
                spell(expected), ", got ", tensor.sym_sizes());
    int64_t index = 0;
    for (const Dim& dim : expected) {
      if (dim.is_known()) {
        TORCH_SYM_CHECK(tensor.sym_size(index).sym_eq(dim.size()), op_, ": expected ", name, " of shape ",
                        spell(expected), ", got ", tensor.sym_sizes());
      }
      ++index;
    }
  }

  void device(const char* name, const at::Tensor& tensor) const {
    TORCH_CHECK(tensor.device() == x_.device(), op_, ": expected ", name, " on ", x_.device(), " as x, got ",
                tensor.device());
  }

  // Kernels are registered for every backend, also for those of sparse tensors.
  void layout(const char* name, const at::Tensor& tensor) const {
    TORCH_CHECK(tensor.layout() == at::kStrided, op_, ": expected ", name, " to be a dense tensor, got one of layout ",
                tensor.layout());
  }

  void dtype(const char* name, const at::Tensor& tensor, at::ScalarType expected) const {
    TORCH_CHECK(tensor.scalar_type() == expected, op_, ": expected ", name, " of dtype ", expected, ", got ",
                tensor.scalar_type());
  }

  // A floating argument: x's dtype and device.
  void like_x(const char* name, const at::Tensor& tensor, std::initializer_list<Dim> expected) const {
    shape(name, tensor, expected);
    layout(name, tensor);
    TORCH_CHECK(tensor.scalar_type() == x_.scalar_type(), op_, ": expected ", name, " of dtype ", x_.scalar_type(),
                " as x, got ", tensor.scalar_type());
    device(name, tensor);
  }

  void input(const at::Tensor& tensor, std::initializer_list<Dim> expected) const {
    shape("x", tensor, expected);
    input(tensor);
  }

  // x of any shape.
  void input(const at::Tensor& tensor) const {
    layout("x", tensor);
    const auto type = tensor.scalar_type();
    TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op_,
                ": expected x of dtype Float, Double, BFloat16 or Half, got ", type);
  }

  // The trailing arguments. bank: any parameter, for N. max_gates: 1, or 2 where keys and values have gates of their
  // own.
  void rows(const RowArguments& rows, const at::Tensor& bank, int64_t max_gates) const {
    const c10::SymInt adapters = bank.sym_size(0);
    TORCH_SYM_CHECK(adapters.sym_ge(1), op_, ": expected a bank of at least one adapter, got parameters of shape ",
                    bank.sym_sizes());
    gate(rows.gate, adapters, max_gates);
    if (rows.adapter_ids.defined()) {
      shape("adapter_ids", rows.adapter_ids, {x_.sym_size(0)});
      dtype("adapter_ids", rows.adapter_ids, at::kLong);
      device("adapter_ids", rows.adapter_ids);
    } else {
      TORCH_SYM_CHECK(adapters.sym_gt(rows.adapter).sym_and(c10::SymInt(rows.adapter).sym_ge(-1)), op_,
                      ": expected adapter in [-1, ", adapters, "), got ", rows.adapter);
    }
    if (rows.token_mask.defined()) {
      shape("token_mask", rows.token_mask, {x_.sym_size(0), x_.sym_size(1)});
      dtype("token_mask", rows.token_mask, at::kBool);
      device("token_mask", rows.token_mask);
    }
  }

 private:
  void gate(const GateParameters& gate, const c10::SymInt& adapters, int64_t max_gates) const {
    TORCH_CHECK(gate.weight.defined() == gate.bias.defined(), op_,
                ": expected gate_weight and gate_bias together, got only ",
                gate.weight.defined() ? "gate_weight" : "gate_bias");
    if (!gate.weight.defined()) {
      return;
    }
    like_x("gate_weight", gate.weight, {adapters, "G", x_.sym_size(2)});
    const c10::SymInt gates = gate.weight.sym_size(1);
    TORCH_SYM_CHECK(gates.sym_ge(1).sym_and(gates.sym_le(max_gates)), op_, ": expected gate_weight with G = 1",
                    max_gates == 2 ? " or 2" : "", " gates, shape [N, G, ", x_.sym_size(2), "], got ",
                    gate.weight.sym_sizes());
    like_x("gate_bias", gate.bias, {adapters, gates});
  }

  const char* op_;
  const at::Tensor& x_;
};

// That attn_mask broadcasts to `target`, aligned at the last dimension, as in scaled_dot_product_attention.
void check_broadcast(const char* op, const at::Tensor& mask, std::initializer_list<Dim> target) {
  TORCH_CHECK(mask.dim() >= 2 && mask.dim() <= static_cast<int64_t>(target.size()), op,
              ": expected attn_mask of 2, 3 or 4 dimensions that broadcasts to ", spell(target), ", got ",
              mask.sym_sizes());
  TORCH_CHECK(mask.scalar_type() == at::kBool || mask.is_floating_point(), op,
              ": expected attn_mask of a floating dtype or Bool, got ", mask.scalar_type());
  const Dim* expected = target.end() - mask.dim();
  for (int64_t index = 0; index < mask.dim(); ++index, ++expected) {
    if (expected->is_known()) {
      const c10::SymInt size = mask.sym_size(index);
      TORCH_SYM_CHECK(size.sym_eq(1).sym_or(size.sym_eq(expected->size())), op,
                      ": expected attn_mask that broadcasts to ", spell(target), ", got ", mask.sym_sizes());
    }
  }
}

void check_heads(const PrefixArguments& args) {
  const char* op = PrefixArguments::kOperator;
  const c10::SymInt heads = args.query.sym_size(1);
  const c10::SymInt kv_heads = args.key.sym_size(1);
  if (args.enable_gqa) {
    TORCH_SYM_CHECK(kv_heads.sym_ge(1), op, ": expected key with at least one head, got ", args.key.sym_sizes());
    TORCH_SYM_CHECK((heads % kv_heads).sym_eq(0), op, ": expected query heads that are a multiple of the ", kv_heads,
                    " key/value heads, got ", heads);
  } else {
    TORCH_SYM_CHECK(heads.sym_eq(kv_heads), op, ": expected key with the ", heads, " heads of query, got ", kv_heads,
                    " (grouped-query attention needs enable_gqa=True)");
  }
}

// LoRA's own arguments and the trailing ones. outputs: O.
template <typename Arguments>
void check_lora(const Checker& checker, const Arguments& args, const c10::SymInt& outputs) {
  checker.like_x("lora_a", args.lora_a, {"N", "r", args.x.sym_size(2)});
  const c10::SymInt adapters = args.lora_a.sym_size(0);
  checker.like_x("lora_b", args.lora_b, {adapters, outputs, args.lora_a.sym_size(1)});
  checker.like_x("scaling", args.scaling, {adapters});
  checker.rows(args.rows, args.lora_a, /*max_gates=*/1);
}

// weight [outputs, inputs] and the bias, which may be absent.
void check_linear(const Checker& checker, const at::Tensor& weight, const at::Tensor& bias, const Dim& outputs,
                  const c10::SymInt& inputs) {
  checker.like_x("weight", weight, {outputs, inputs});
  if (bias.defined()) {
    checker.like_x("bias", bias, {weight.sym_size(0)});
  }
}

// The bottleneck's own arguments and the trailing ones.
template <typename Arguments>
void check_bottleneck(const Checker& checker, const Arguments& args) {
  const char* op = Arguments::kOperator;
  const c10::SymInt hidden = args.x.sym_size(2);
  checker.like_x("down_weight", args.down_weight, {"N", "R", hidden});
  const c10::SymInt adapters = args.down_weight.sym_size(0);
  const c10::SymInt bottleneck = args.down_weight.sym_size(1);
  checker.like_x("down_bias", args.down_bias, {adapters, bottleneck});
  checker.like_x("up_weight", args.up_weight, {adapters, hidden, bottleneck});
  checker.like_x("up_bias", args.up_bias, {adapters, hidden});
  checker.like_x("scaling", args.scaling, {adapters, "1 or H"});
  const c10::SymInt width = args.scaling.sym_size(1);
  TORCH_SYM_CHECK(width.sym_eq(1).sym_or(width.sym_eq(hidden)), op, ": expected scaling of shape [", adapters,
                  ", 1] or [", adapters, ", ", hidden, "], got ", args.scaling.sym_sizes());
  find_activation(args.non_linearity, op);  // throws, and lists the names, when there is none
  checker.rows(args.rows, args.down_weight, /*max_gates=*/1);
}

}  // namespace

void check(const LoraArguments& args) {
  const Checker checker(args);
  checker.input(args.x, {"B", "S", "I"});
  checker.like_x("base", args.base, {args.x.sym_size(0), args.x.sym_size(1), "O"});
  check_lora(checker, args, args.base.sym_size(2));
}

void check(const LoraLinearArguments& args) {
  const Checker checker(args);
  checker.input(args.x, {"B", "S", "I"});
  check_linear(checker, args.weight, args.bias, "O", args.x.sym_size(2));
  check_lora(checker, args, args.weight.sym_size(0));
}

void check(const BottleneckArguments& args) {
  const Checker checker(args);
  checker.input(args.x, {"B", "S", "H"});
  checker.like_x("residual", args.residual, {args.x.sym_size(0), args.x.sym_size(1), args.x.sym_size(2)});
  check_bottleneck(checker, args);
}

void check(const BottleneckLinearArguments& args) {
  const Checker checker(args);
  checker.input(args.x, {"B", "S", "H"});
  checker.like_x("input", args.input, {args.x.sym_size(0), args.x.sym_size(1), "I"});
  check_linear(checker, args.weight, args.bias, args.x.sym_size(2), args.input.sym_size(2));
  check_bottleneck(checker, args);
}

void check(const PrefixArguments& args) {
  const char* op = PrefixArguments::kOperator;
  const Checker checker(args);
  checker.input(args.x, {"B", "S", "H"});
  const c10::SymInt batch = args.x.sym_size(0);
  const c10::SymInt tokens = args.x.sym_size(1);
  checker.like_x("query", args.query, {batch, "h", tokens, "d"});
  const c10::SymInt head_size = args.query.sym_size(3);
  checker.like_x("key", args.key, {batch, "h_kv", "S_k", head_size});
  const c10::SymInt kv_heads = args.key.sym_size(1);
  checker.like_x("value", args.value, {batch, kv_heads, args.key.sym_size(2), head_size});
  check_heads(args);
  checker.like_x("prefix_key", args.prefix_key, {"N", kv_heads, "P", head_size});
  const c10::SymInt adapters = args.prefix_key.sym_size(0);
  checker.like_x("prefix_value", args.prefix_value, {adapters, kv_heads, args.prefix_key.sym_size(2), head_size});
  checker.shape("prefix_length", args.prefix_length, {adapters});
  checker.dtype("prefix_length", args.prefix_length, at::kLong);
  checker.device("prefix_length", args.prefix_length);
  if (args.attn_mask.defined()) {
    TORCH_CHECK(!args.is_causal, op,
                ": expected is_causal=False beside an attn_mask, got both; merge the causal mask into attn_mask");
    check_broadcast(op, args.attn_mask, {batch, args.query.sym_size(1), tokens, args.key.sym_size(2)});
    checker.layout("attn_mask", args.attn_mask);
    checker.device("attn_mask", args.attn_mask);
  }
  TORCH_CHECK(args.dropout_p >= 0.0 && args.dropout_p <= 1.0, op, ": expected dropout_p in [0, 1], got ",
              args.dropout_p);
  checker.rows(args.rows, args.prefix_key, /*max_gates=*/2);
}

void check(const ReftArguments& args) {
  const char* op = ReftArguments::kOperator;
  const Checker checker(args);
  checker.input(args.x, {"B", "S", "H"});
  const c10::SymInt hidden = args.x.sym_size(2);
  checker.like_x("source_weight", args.source_weight, {"N", "U", "r", hidden});
  const c10::SymInt adapters = args.source_weight.sym_size(0);
  const c10::SymInt units = args.source_weight.sym_size(1);
  const c10::SymInt rank = args.source_weight.sym_size(2);
  TORCH_SYM_CHECK(units.sym_ge(1).sym_and(units.sym_le(2)), op, ": expected source_weight with U = 1 or 2 units, ",
                  "shape [N, U, r, ", hidden, "], got ", args.source_weight.sym_sizes());
  checker.like_x("source_bias", args.source_bias, {adapters, units, rank});
  checker.like_x("projection", args.projection, {adapters, units, rank, hidden});
  checker.like_x("subtraction", args.subtraction, {adapters});
  checker.shape("positions", args.positions, {adapters, c10::SymInt(2)});
  checker.dtype("positions", args.positions, at::kLong);
  checker.layout("positions", args.positions);
  checker.device("positions", args.positions);
  find_activation(args.non_linearity, op);  // throws when there is none
  checker.rows(args.rows(), args.source_weight, /*max_gates=*/1);
}

void check(const LinearArguments& args) {
  const Checker checker(args);
  TORCH_CHECK(args.x.dim() >= 1, LinearArguments::kOperator, ": expected x of shape [..., I], got one number");
  checker.input(args.x);
  check_linear(checker, args.weight, args.bias, "O", args.x.sym_size(-1));
  find_activation(args.non_linearity, LinearArguments::kOperator);  // throws when there is none
}

void check(const ResidualNormArguments& args) {
  const char* op = ResidualNormArguments::kOperator;
  const Checker checker(args);
  checker.layout("x", args.x);
  checker.layout("residual", args.residual);
  TORCH_CHECK(at::isFloatingType(at::result_type(args.x, args.residual)), op,
              ": expected x or residual of a floating dtype, got ", args.x.scalar_type(), " and ",
              args.residual.scalar_type());
  TORCH_CHECK(!args.normalized_shape.empty(), op, ": expected normalized_shape of one number or more, got none");
  const c10::SymIntArrayRef expected = args.normalized_shape;
  for (const auto& [name, tensor] : {std::pair("weight", args.weight), std::pair("bias", args.bias)}) {
    if (tensor.defined()) {
      TORCH_CHECK(tensor.sym_sizes() == expected, op, ": expected ", name, " of shape ", expected,
                  ", as normalized_shape, got ", tensor.sym_sizes());
      checker.layout(name, tensor);
      checker.device(name, tensor);
    }
  }
}

void check_sum(const ResidualNormArguments& args, const at::Tensor& sum) {
  const c10::SymIntArrayRef expected = args.normalized_shape;
  const auto first = sum.dim() - static_cast<int64_t>(expected.size());
  const char* text = ": expected x + residual to end in the sizes of normalized_shape, ";
  TORCH_CHECK(first >= 0, args.kOperator, text, expected, ", got ", sum.sym_sizes());
  for (int64_t dim = first; dim < sum.dim(); ++dim) {
    TORCH_SYM_CHECK(sum.sym_size(dim).sym_eq(expected[dim - first]), args.kOperator, text, expected, ", got ",
                    sum.sym_sizes());
  }
}

void check(const TokenMaskArguments& args) {
  const Checker checker(args);
  checker.shape("x", args.x, {"B", "S", "H"});
  checker.layout("x", args.x);
  if (args.attn_mask.defined()) {
    check_broadcast(TokenMaskArguments::kOperator, args.attn_mask,
                    {args.x.sym_size(0), "h", "S_q", args.x.sym_size(1)});
    checker.layout("attn_mask", args.attn_mask);
    checker.device("attn_mask", args.attn_mask);
  }
}

}  // namespace torchgraft::ops
