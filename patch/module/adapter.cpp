#include <torchgraft/patch/module/adapter.h>

#include <c10/util/Exception.h>

namespace torchgraft {

size_t find_adapter(const std::vector<Adapter>& adapters, const std::string& name, const char* what) {
  std::string names;
  for (size_t i = 0; i < adapters.size(); ++i) {
    if (adapters[i].name == name) {
      return i;
    }
    names += (i == 0 ? "" : ", ") + adapters[i].name;
  }
  TORCH_CHECK(false, what, ": no adapter is called '", name, "'; there are: ", names);
}

}  // namespace torchgraft
