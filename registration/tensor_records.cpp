#include <torchgraft/registration/tensor_records.h>

#include <torchgraft/registration/pickle_tensors.h>

#include <c10/util/Exception.h>
#include <caffe2/serialize/inline_container.h>

#include <string_view>

namespace torchgraft {

void check_tensor_records(const std::string& path) {
  caffe2::serialize::PyTorchStreamReader file(path);
  for (const std::string archive : {"constants", "data"}) {
    const std::string name = archive + ".pkl";
    TORCH_CHECK(file.hasRecord(name), "it has no ", name, ", as the files of torch.jit.save() have since PyTorch 1.4");
    const auto [pickle, size] = file.getRecord(name);
    check_pickled_tensors(std::string_view(static_cast<const char*>(pickle.get()), size),
                          [&](const std::string& key) { return file.getRecordSize(archive + "/" + key); });
  }
}

}  // namespace torchgraft
