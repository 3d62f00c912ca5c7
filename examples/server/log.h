#pragma once

#include <string>

// Writes a line to stderr, cut to 4 KiB. Drops it instead of waiting when nobody reads what stderr is connected to: a
// full pipe would stop the server. The next line that is written then says how many are missing. Any thread may call
// it.
void log_line(const std::string& line);
