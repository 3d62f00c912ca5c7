#pragma once

#include <string>

struct MHD_Connection;

// What a request's headers say of where its body ends.
struct Framing {
  int headers = 0;
  int lengths = 0;
  int encodings = 0;
  std::string fault;  // of a name or a value
};

Framing read_framing(MHD_Connection* connection);

// Why nobody can say for sure where the body ends; empty if all can. A proxy before this server may choose another end
// than libmicrohttpd: what it takes for a body would then be the next client's request.
std::string framing_fault(const Framing& framing);
