#pragma once

#include <torchgraft/patch/sites/find_sites.h>

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// Checks that rows reach the layers in the order in which forward gets them: `adapter_ids` has that order. Models sort
// rows by length, turn them round, or swap their halves, and put them back behind the layers.
//
// Models of tables attend in turns across tokens and across rows, which have no rows of their own there.
//
// Follows the tokens of each layer back to the inputs, with the dimension that holds the rows, and looks for what
// chooses or moves rows there: an index, a sort, flip, roll, or parts of rows that are joined again. A product with a
// matrix that mixes rows, or what a loop does, is not seen here; verify_results() compares such a module's rows. Throws
// c10::Error that names the node.
void check_row_order(const GraphSites& sites, const torch::jit::Module& root);

}  // namespace torchgraft
