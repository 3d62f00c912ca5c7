#include "http_framing.h"

#include <microhttpd.h>

#include <algorithm>
#include <cctype>
#include <string_view>

namespace {

bool is_token(std::string_view name) {
  constexpr std::string_view kMarks = "!#$%&'*+-.^_`|~";
  return !name.empty() && std::all_of(name.begin(), name.end(), [&](unsigned char c) {
    return (c < 0x80 && std::isalnum(c)) || kMarks.find(static_cast<char>(c)) != std::string_view::npos;
  });
}

bool is_same_name(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](unsigned char x, unsigned char y) { return std::tolower(x) == std::tolower(y); });
}

bool has_control(std::string_view value) {
  return std::any_of(value.begin(), value.end(), [](unsigned char c) { return (c < ' ' && c != '\t') || c == 0x7f; });
}

MHD_Result read_header(void* framing, MHD_ValueKind, const char* key, const char* text) {
  auto& result = *static_cast<Framing*>(framing);
  const std::string_view name = key ? key : "";
  const std::string_view value = text ? text : "";
  ++result.headers;
  if (!is_token(name)) {
    result.fault = "expected a header's name without spaces and marks before its colon";
  } else if (has_control(value)) {  // a carriage return, where another reader may see the end of the line
    result.fault = "expected a header's value without control characters";
  } else if (is_same_name(name, MHD_HTTP_HEADER_CONTENT_LENGTH)) {
    ++result.lengths;
    if (value.empty() || !std::all_of(value.begin(), value.end(), [](unsigned char c) { return std::isdigit(c); })) {
      result.fault = "expected Content-Length to be a number";
    }
  } else if (is_same_name(name, MHD_HTTP_HEADER_TRANSFER_ENCODING)) {
    ++result.encodings;
    if (!is_same_name(value, "chunked")) {
      result.fault = "expected Transfer-Encoding to be chunked";
    }
  }
  return MHD_YES;
}

}  // namespace

Framing read_framing(MHD_Connection* connection) {
  Framing framing;
  MHD_get_connection_values(connection, MHD_HEADER_KIND, &read_header, &framing);
  return framing;
}

std::string framing_fault(const Framing& framing) {
  if (framing.lengths + framing.encodings > 1) {
    return "expected Content-Length or Transfer-Encoding, and once";
  }
  return framing.fault;
}
