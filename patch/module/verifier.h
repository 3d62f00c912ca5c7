#pragma once

namespace torchgraft {

// The function that compares results, for errors.
struct Verifier {
  const char* what;         // "graft"
  const char* remedy = "";  // what its user can do, as the error's end
};

// Of a function with VerifyOptions.
inline Verifier verifier_of_change(const char* what) {
  return {what, ". Nothing was changed; verify=False (C++: VerifyOptions::verify = false) does without"};
}

}  // namespace torchgraft
