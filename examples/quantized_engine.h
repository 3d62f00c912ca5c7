// --quantized-engine, for all examples that load a TorchScript module.
#pragma once

#include <ATen/Context.h>

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

// The name that torch.backends.quantized.engine has for an engine.
inline std::string quantized_engine_name(at::QEngine engine) { return CLI::detail::to_lower(at::toString(engine)); }

// Adds the option. Its value holds for every int8 module that the process loads from then on: a module packs its
// weights when it is loaded, for the engine of that moment. docs/int8.md says which engine is fast where.
inline CLI::Option* add_quantized_engine(CLI::App& app) {
  std::vector<std::string> names;
  for (const at::QEngine engine : at::globalContext().supportedQEngines()) {
    names.push_back(quantized_engine_name(engine));
  }
  const auto choose = [](const std::string& name) {
    for (const at::QEngine engine : at::globalContext().supportedQEngines()) {
      if (quantized_engine_name(engine) == name) {
        at::globalContext().setQEngine(engine);
      }
    }
  };
  return app
      .add_option_function<std::string>("--quantized-engine", choose,
                                        "torch's library for the products of an int8 model")
      ->check(CLI::IsMember(names))
      ->default_str(quantized_engine_name(at::globalContext().qEngine()));
}
