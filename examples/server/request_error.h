#pragma once

#include <stdexcept>
#include <string>

// Why the server refuses a request, and the status of the answer.
struct RequestError : std::runtime_error {
  RequestError(int code, const std::string& message) : std::runtime_error(message), status(code) {}
  int status;
};
