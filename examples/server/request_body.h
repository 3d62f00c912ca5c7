#pragma once

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <string>
#include <vector>

// Reading the bodies of requests. All throw RequestError 400 that says what is wrong.

// `deepest`: how many levels the body may have. Refuses a name that an object has twice: a proxy that looks into the
// body may read the other value.
nlohmann::json parse_body(const std::string& text, int deepest);

// A value for a message: of lists and objects only the kind, for they may be as long as a body.
std::string shown_value(const nlohmann::json& value);

// A name, or null for the base model, which is "" here.
std::string read_adapter_name(const nlohmann::json& value);

// Token ids, or other integers from 0.
std::vector<int64_t> read_ids(const nlohmann::json& list, const std::string& place);
