#include "binding.h"

#include <torchgraft/patch/check_room.h>

#include <memory>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace torchgraft_python {
namespace {

using torchgraft::AdapterPool;
using Lease = AdapterPool::Lease;

torchgraft::AdapterPoolOptions options_of(int64_t capacity, const std::vector<std::string>& room,
                                          const std::string& gate_pooling, const std::string& token_mask_input,
                                          int64_t max_row_bytes) {
  torchgraft::AdapterPoolOptions options;
  options.capacity = capacity;
  options.max_row_bytes = max_row_bytes;
  options.graft.gate_pooling = gate_pooling;
  options.graft.token_mask_input = token_mask_input;
  for (const std::string& config : room) {
    options.room.push_back(config_of(config));
  }
  return options;
}

std::unique_ptr<AdapterPool> make_pool(const torch::jit::Module& module, int64_t capacity,
                                       const std::vector<std::string>& room, const std::string& gate_pooling,
                                       const std::string& token_mask_input, int64_t max_row_bytes,
                                       const std::vector<int64_t>& composition_limits) {
  torchgraft::AdapterPoolOptions options = options_of(capacity, room, gate_pooling, token_mask_input, max_row_bytes);
  options.max_compositions = composition_limits.at(0);
  options.max_composition_parts = composition_limits.at(1);
  options.max_composition_depth = composition_limits.at(2);
  return std::make_unique<AdapterPool>(module, options);
}

std::vector<std::string> check_room(const torch::jit::Module& module, const std::vector<std::string>& room,
                                    const std::string& gate_pooling, const std::string& token_mask_input,
                                    int64_t max_row_bytes) {
  return torchgraft::check_room(module, options_of(1, room, gate_pooling, token_mask_input, max_row_bytes));
}

py::dict stats_of(const AdapterPool& pool) {
  const torchgraft::AdapterPoolStats stats = pool.stats();
  py::dict result;
  result["capacity"] = stats.capacity;
  result["resident"] = stats.resident;
  result["row_bytes"] = stats.row_bytes;
  result["bank_bytes"] = stats.bank_bytes;
  result["loads"] = stats.loads;
  result["evictions"] = stats.evictions;
  result["rebuilds"] = stats.rebuilds;
  result["compositions"] = stats.compositions;
  return result;
}

}  // namespace

// A method that may wait for another thread's lease releases the GIL: that thread may need the GIL to end its lease.
void bind_adapter_pool(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("check_room", &check_room, no_gil);
  py::class_<Lease>(m, "Lease")
      .def("module", [](const Lease& lease) { return lease.module(); })
      .def("same_module", &Lease::same_module)
      .def("ids", &Lease::ids);
  py::class_<AdapterPool>(m, "AdapterPool")
      .def(py::init(&make_pool), no_gil)
      .def("acquire", &AdapterPool::acquire, no_gil)
      .def("try_acquire", &AdapterPool::try_acquire, no_gil)
      .def(
          "insert",
          [](AdapterPool& pool, const Spec& spec) {
            WarningCollector warnings;
            const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
            pool.insert(spec_of(spec));
            return warnings.messages();
          },
          no_gil)
      .def("evict", &AdapterPool::evict, no_gil)
      .def(
          "compose",
          [](AdapterPool& pool, const std::string& name, const std::string& json) {
            pool.compose(name, torchgraft::composition_from_json(json));
          },
          no_gil)
      .def("remove_composition", &AdapterPool::remove_composition, no_gil)
      .def("compositions", &AdapterPool::compositions, no_gil)
      .def("resident", &AdapterPool::resident, no_gil)
      .def("room",
           [](const AdapterPool& pool) {
             std::vector<std::string> configs;
             for (const torchgraft::AdapterConfig& config : pool.room()) {
               configs.push_back(torchgraft::config_to_json(config));
             }
             return configs;
           })
      .def("stats", &stats_of);
}

}  // namespace torchgraft_python
