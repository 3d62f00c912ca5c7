#pragma once

#include <c10/util/Exception.h>

namespace torchgraft {

// Drops what this thread warns of while it lives: of runs and of torch's quantiser, for which the caller has not asked.
class NoWarnings {
 private:
  class Handler : public c10::WarningHandler {
   public:
    void process(const c10::Warning&) override {}
  };

  Handler handler_;
  c10::WarningUtils::WarningHandlerGuard guard_{&handler_};
};

}  // namespace torchgraft
