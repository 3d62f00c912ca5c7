// Serves one batch with a grafted TorchScript module, without Python: knows libtorch and libtorchgraft.so only.

#include "../number_option.h"
#include "../quantized_engine.h"
#include "inputs.h"
#include "model.h"
#include "report.h"

#include <torchgraft/registration/error_text.h>

#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <string>
#include <vector>

namespace {

struct Options {
  std::string model;
  std::string inputs;
  Choice choice;
  int threads = 0;
  int repeat = 0;
  std::string output;
};

void declare(CLI::App& app, Options& options) {
  app.add_option("MODEL.pt", options.model, "a grafted module, or any TorchScript file")->required();
  app.add_option("INPUTS.json", options.inputs, R"({"inputs": [one nested list per argument], "dtypes": ["int64"]})")
      ->required();
  auto* adapter = app.add_option("--adapter", options.choice.adapter, "the adapter for every row");
  app.add_option("--adapter-ids", options.choice.ids, "one adapter number per row, -1 for the base model: 0,1,-1")
      ->delimiter(',')
      ->transform(number<int64_t>({-1}))
      ->excludes(adapter);
  add_number(app, "--threads", options.threads, "threads for each operator (libtorch's default)", 1);
  add_quantized_engine(app);
  add_number(app, "--repeat", options.repeat, "also time this many passes", 0);
  app.add_option("--output", options.output, "write output and gates in full precision to this JSON file");
}

void print_adapters(Model& model) {
  std::cout << "adapters";
  const std::string active = model.active_adapter();
  int index = 0;
  for (const std::string& name : model.adapter_names()) {
    std::cout << "  " << index++ << " " << name << (name == active ? " (active)" : "");
  }
  std::cout << (index == 0 ? "  none" : "") << "\n";
}

void serve(const Options& options) {
  if (options.threads > 0) {
    at::set_num_threads(options.threads);
  }
  const std::vector<c10::IValue> inputs = read_inputs(options.inputs);
  Model model(options.model);
  if (!options.choice.adapter.empty()) {
    model.activate(options.choice.adapter);
  }
  print_adapters(model);
  const Response response = model.run(inputs, options.choice.ids);
  const std::vector<double> milliseconds =
      options.repeat > 0 ? model.time(inputs, options.choice.ids, options.repeat) : std::vector<double>();
  print_report(std::cout, response, milliseconds);
  if (!options.output.empty()) {
    write_report(options.output, response, milliseconds);
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Runs a grafted TorchScript module on one batch and shows its output and gates.", "serve");
  Options options;
  declare(app, options);
  try {
    app.parse(argc, argv);
    serve(options);
    return 0;
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::cerr << "serve: " << torchgraft::one_line(error) << " (serve --help)\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "serve: " << torchgraft::one_line(error) << "\n";
  }
  return 1;
}
