// Serves one batch with an AOTInductor package of a grafted module: libtorch and libtorchgraft.so, no Python and no
// TorchScript but for the file that other banks are read from.

#include "../number_option.h"
#include "../serve/inputs.h"
#include "../serve/report.h"
#include "package.h"

#include <torchgraft/registration/error_text.h>

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <iostream>
#include <string>
#include <vector>

namespace {

struct Options {
  std::string package;
  std::string inputs;
  std::vector<int64_t> ids;
  std::string model;  // what the package was made of
  std::string banks;
  int threads = 0;
  int repeat = 0;
  std::string output;
};

void declare(CLI::App& app, Options& options) {
  app.add_option("PACKAGE.pt2", options.package, "what torchgraft export MODEL.pt --aoti wrote")->required();
  app.add_option("INPUTS.json", options.inputs, R"({"inputs": [one nested list per argument], "dtypes": ["int64"]})")
      ->required();
  app.add_option("--adapter-ids", options.ids, "one adapter number per row, -1 for the base model: 0,1,-1")
      ->delimiter(',')
      ->transform(number<int64_t>({-1}));
  auto* banks = app.add_option("--banks", options.banks, "a grafted .pt: its adapters take the place of the package's");
  auto* model = app.add_option("--model", options.model, "the MODEL.pt that the package was made of, to compare sizes");
  banks->needs(model);
  add_number(app, "--threads", options.threads, "threads for each operator (libtorch's default)", 1);
  add_number(app, "--repeat", options.repeat, "also time this many passes", 0);
  app.add_option("--output", options.output, "write output and gates in full precision to this JSON file");
}

std::vector<at::Tensor> tensors_of(const std::vector<c10::IValue>& values) {
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : values) {
    if (value.isTensor()) {  // a null is an argument that the export has left out
      tensors.push_back(value.toTensor());
    }
  }
  return tensors;
}

double milliseconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

void serve(const Options& options) {
  if (options.threads > 0) {
    at::set_num_threads(options.threads);
  }
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> inputs = tensors_of(read_inputs(options.inputs));
  Package package(options.package);
  std::cout << "adapters";
  int index = 0;
  for (const std::string& name : package.adapter_names()) {
    std::cout << "  " << index++ << " " << name;
  }
  std::cout << "\n";
  if (!options.banks.empty()) {
    const BankFile banks = read_banks(options.banks), like = read_banks(options.model);
    const auto begin = std::chrono::steady_clock::now();
    package.swap_banks(banks, like);
    std::cout << "banks swapped in " << milliseconds_since(begin) << " ms\n";
  }
  const Response response = package.run(inputs, options.ids);
  std::vector<double> milliseconds;
  for (int pass = 0; pass < options.repeat; ++pass) {
    const auto begin = std::chrono::steady_clock::now();
    package.run(inputs, options.ids);
    milliseconds.push_back(milliseconds_since(begin));
  }
  print_report(std::cout, response, milliseconds);
  if (!options.output.empty()) {
    write_report(options.output, response, milliseconds);
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Runs an AOTInductor package of a grafted module on one batch.", "serve_aoti");
  Options options;
  declare(app, options);
  try {
    app.parse(argc, argv);
    serve(options);
    return 0;
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::cerr << "serve_aoti: " << torchgraft::one_line(error) << " (serve_aoti --help)\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "serve_aoti: " << torchgraft::one_line(error) << "\n";
  }
  return 1;
}
