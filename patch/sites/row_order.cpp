#include <torchgraft/patch/sites/row_order.h>

#include <torchgraft/patch/canonicalise/may_be_attention.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/symbolic_shape.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <set>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

// A value one of whose sizes is the number of rows.
struct Rows {
  Value* value;
  Dim count;
  bool is_part;  // of rows that a concatenation joins
};

class RowOrder {
 public:
  explicit RowOrder(const Module& root) : shapes_(root) {}

  SymbolicShapes& shapes() { return shapes_; }

  // The node that gives `tokens` its rows in another order; null when there is none.
  const Node* moved_behind(Value* tokens, const Dim& count) {
    std::vector<Rows> frontier = {{tokens, count, false}};
    for (size_t i = 0; i < frontier.size(); ++i) {
      const Rows rows = frontier[i];
      Node* node = rows.value->node();
      if (rows.count == number(1) || !seen_.emplace(rows.value, rows.is_part).second) {
        continue;
      }
      if (moves(node, rows)) {
        return node;
      }
      follow(node, rows, frontier);
    }
    return nullptr;
  }

 private:
  // Whether dimension `dim` of `value`, which may count from the back, holds the rows. Of an argument, whose shape
  // nothing tells, it is the first.
  bool holds_rows(Value* value, int64_t dim, const Rows& rows) {
    const auto shape = shapes_.shape(value);
    if (!shape) {
      return strip_layout(value)->node()->kind() == c10::prim::Param && (dim == 0 || dim <= -3);
    }
    const auto rank = static_cast<int64_t>(shape->size());
    const int64_t place = dim < 0 ? dim + rank : dim;
    return place >= 0 && place < rank && (*shape)[place] == shapes_.canonical(rows.count);
  }

  bool holds_rows(Node* node, const char* argument, const Rows& rows) {
    const auto dim = constant_int(node->namedInput(argument));
    return !dim || holds_rows(node->input(0), *dim, rows);
  }

  // Whether one of the dimensions that the node lists holds the rows. Without a list it is all of them.
  bool lists_rows(Node* node, const Rows& rows) {
    const auto dims = shapes_.integers(node->namedInput("dims"));
    return !dims || dims->empty() || std::any_of(dims->begin(), dims->end(), [&](const Dim& dim) {
      return !dim.is_constant() || holds_rows(node->input(0), dim.factor, rows);
    });
  }

  // arange(n), which takes each of n rows once, in order.
  static bool counts_up(Node* node) {
    if (!is_aten(node, {"arange"})) {
      return false;
    }
    const auto has = [&](const char* argument) { return node->schema().argumentIndexWithName(argument).has_value(); };
    const bool from_0 = !has("start") || constant_int(node->namedInput("start")) == 0;
    return from_0 && (!has("step") || constant_int(node->namedInput("step")) == 1);
  }

  // x[order], or x[order] = y: whether one of the indices is for the rows. A number that is written (h[~mask] = 0)
  // moves none.
  bool indexes_rows(Node* node, const Rows& rows) {
    Node* list = node->namedInput("indices")->node();
    const bool writes = is_aten(node, {"index_put"});
    if (list->kind() != c10::prim::ListConstruct || !depends_on_inputs(node->input(0)) ||
        (writes && !depends_on_inputs(node->namedInput("values")))) {
      return false;
    }
    for (size_t dim = 0; dim < list->inputs().size(); ++dim) {
      Value* index = list->input(dim);
      if (!is_none(index) && !counts_up(strip_layout(index)->node()) &&
          (holds_rows(node->input(0), static_cast<int64_t>(dim), rows) ||
           (!writes && takes_rows_from_index(node, rows)))) {
        return true;
      }
    }
    return false;
  }

  // Whether the result of an indexing has as many rows as the index, by a size that the operand does not have: rows of
  // another input than the one that counts them (x[lengths.argsort()]).
  bool takes_rows_from_index(Node* node, const Rows& rows) {
    const auto before = shapes_.shape(node->input(0));
    const auto after = shapes_.shape(rows.value);
    const Dim count = shapes_.canonical(rows.count);
    const auto has_count = [&](const Shape& shape) {
      return std::find(shape.begin(), shape.end(), count) != shape.end();
    };
    return before && after && has_count(*after) && !has_count(*before);
  }

  // Whether `node`, which makes rows.value, has them in another order than its operand, or may have.
  bool moves(Node* node, const Rows& rows) {
    if (node->inputs().empty() || !is_tensor(node->input(0))) {
      return false;
    }
    if (is_aten(node, {"index", "index_put"})) {
      return indexes_rows(node, rows);
    }
    if (is_aten(node, {"index_select", "gather"})) {
      return holds_rows(node, "dim", rows) || (depends_on_inputs(node->input(0)) && takes_rows_from_index(node, rows));
    }
    if (is_aten(node, {"sort", "topk", "index_copy", "index_add", "scatter", "scatter_add"})) {
      return holds_rows(node, "dim", rows);
    }
    if (is_aten(node, {"take_along_dim"})) {
      return is_none(node->namedInput("dim")) || holds_rows(node, "dim", rows);
    }
    if (is_aten(node, {"msort"})) {
      return holds_rows(node->input(0), 0, rows);
    }
    if (is_aten(node, {"flip", "roll"})) {
      return lists_rows(node, rows);
    }
    // The parts that a concatenation joins: of different inputs, or of the rows of one.
    return rows.is_part &&
           is_aten(node, {"slice", "narrow", "select", "chunk", "split", "split_with_sizes", "unbind", "tensor_split",
                          "unsafe_chunk", "unsafe_split"}) &&
           is_cut_along_rows(node, rows);
  }

  bool is_cut_along_rows(Node* node, const Rows& rows) {
    if (is_whole_slice(node)) {
      return false;
    }
    const auto shape = shapes_.shape(node->input(0));
    const auto cut = shape ? position(node->namedInput("dim"), shape->size()) : std::nullopt;
    if (!cut) {
      return true;
    }
    const auto result = is_tensor(rows.value) ? shapes_.shape(rows.value) : std::nullopt;
    // A cut along another dimension leaves the rows as they are.
    const bool keeps = result && result->size() == shape->size() && (*result)[*cut] == (*shape)[*cut];
    const bool is_elsewhere = std::any_of(shape->begin(), shape->end(), [&](const Dim& size) {
      return size == shapes_.canonical(rows.count) && &size != &(*shape)[*cut];
    });
    return !keeps && !is_elsewhere;
  }

  void follow(Node* node, const Rows& rows, std::vector<Rows>& frontier) {
    if (node->kind() == c10::prim::If) {
      for (torch::jit::Block* block : node->blocks()) {
        frontier.push_back({block->outputs()[rows.value->offset()], rows.count, rows.is_part});
      }
      return;
    }
    const auto joined = joined_tensors(node);
    if (!joined.empty()) {
      const auto shape = shapes_.shape(rows.value);
      const auto dim = shape ? position(node->namedInput("dim"), shape->size()) : std::nullopt;
      const bool joins_rows = dim ? (*shape)[*dim] == shapes_.canonical(rows.count)
                                  : constant_int(node->namedInput("dim")).value_or(0) == 0;
      for (Value* part : joined) {
        const auto sizes = shapes_.shape(part);
        const bool is_known = joins_rows && dim && sizes && *dim < sizes->size();
        frontier.push_back({part, is_known ? (*sizes)[*dim] : rows.count, rows.is_part || joins_rows});
      }
      return;
    }
    const bool writes = is_aten(node, {"index_put"});
    for (Value* input : node->inputs()) {
      if (writes && input == node->namedInput("indices")) {
        continue;
      }
      if (!input->type()->cast<c10::IntType>()) {
        frontier.push_back({input, count_in(input, rows), rows.is_part});
      }
    }
  }

  // The number of rows in an operand: the same, or, where rows are joined with another dimension, its first size.
  Dim count_in(Value* input, const Rows& rows) {
    const auto shape = is_tensor(input) ? shapes_.shape(input) : std::nullopt;
    const Dim count = shapes_.canonical(rows.count);
    if (!shape || shape->empty() || std::find(shape->begin(), shape->end(), count) != shape->end()) {
      return count;
    }
    return count.divided_by(shape->front()) ? shape->front() : count;
  }

  SymbolicShapes shapes_;
  std::set<std::pair<const Value*, bool>> seen_;
};

// Checks that no layer attends across the rows of another, as models of tables do in turns.
void check_same_rows(const std::vector<Shape>& queries, const SymbolicShapes& shapes) {
  for (size_t i = 0; i < queries.size(); ++i) {
    for (size_t j = 0; j < queries.size(); ++j) {
      const Dim rows = shapes.canonical(queries[j][0]);
      const bool swaps = !(rows == shapes.canonical(queries[i][0])) && rows == shapes.canonical(queries[i][2]);
      TORCH_CHECK(!swaps || rows == number(1), "graft: attention ", j, " takes the tokens of attention ", i,
                  " for rows and attends across rows; adapter_ids, which has a number for each row of the module's "
                  "inputs, means nothing there");
    }
  }
}

}  // namespace

void check_row_order(const GraphSites& sites, const Module& root) {
  RowOrder order(root);
  SymbolicShapes& shapes = order.shapes();
  std::vector<Shape> queries;  // [rows, heads, tokens, head size]
  for (size_t i = 0; i < sites.layers.size(); ++i) {
    const LinearSite& query = sites.layers[i].query;
    if (const Node* attention = sites.layers[i].attention) {  // null where edited sites describe the layer
      const auto heads = shapes.shape(attention->namedInput("query"));
      if (heads && heads->size() == 4) {
        queries.push_back(*heads);
      }
    }
    const auto shape = query.node ? shapes.shape(linear_input(query.node)) : std::nullopt;
    if (!shape || shape->size() < 2) {
      continue;
    }
    const Node* node = order.moved_behind(linear_input(query.node), (*shape)[query.sequence_first ? 1 : 0]);
    TORCH_CHECK(!node, "graft: rows reach layer ", sites.structure.layers[i].number,
                " in another order than the module gets them: ", described(node),
                " chooses or moves rows, and adapter_ids would give rows the adapters of others; order the rows before "
                "the module is called, and put the results back behind it");
  }
  check_same_rows(queries, shapes);
}

}  // namespace torchgraft
