// Continues prompts with a grafted decoder, each with its own adapter, without Python: knows libtorch and
// libtorchgraft.so only. Token ids go in and come out.

#include "../number_option.h"
#include "../quantized_engine.h"
#include "beam_search.h"
#include "decoder.h"
#include "generation.h"
#include "prompts.h"

#include <torchgraft/registration/error_text.h>

#include <ATen/Parallel.h>
#include <torch/script.h>

#include <CLI/CLI.hpp>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Options {
  std::string model;
  std::string prompts;
  std::string adapter;
  std::string output;
  DecoderForm form;
  GenerationOptions generation;
  BeamOptions beams;
  std::vector<int64_t> stop;
  bool sample = false;
  bool stream = false;
  int threads = 0;
};

void declare(CLI::App& app, Options& options) {
  DecoderForm& form = options.form;
  app.add_option("MODEL.pt", options.model, "a decoder: forward(ids, mask, [positions,] caches...)")->required();
  app.add_option("PROMPTS.json", options.prompts, R"({"prompts": [[5, 6, 7], [8]]}: token ids)")->required();
  add_number(app, "--heads", form.heads, "heads of keys and values (graft.py inspect shows them)", 1, kMostHeads)
      ->required();
  add_number(app, "--head-size", form.head_size, "the size of each head", 1, kLargestHead)->required();
  add_number(app, "--layers", form.layers, "the length of a cache that is a list", 1, kMostLayers);
  add_number(app, "--max-positions", form.max_positions, "how many tokens the model has positions for", 1);
  app.add_flag("--mask-of-tokens", form.mask_of_tokens,
               "the mask is [batch, tokens], 1 for real ones (else [batch, 1, queries, tokens], added to the scores)");
  auto* adapter = app.add_option("--adapter", options.adapter, "the adapter of every sequence");
  app.add_option("--adapter-ids", options.generation.adapter_ids,
                 "one adapter number per prompt, -1 for the base model: 0,1,-1")
      ->delimiter(',')
      ->transform(number<int64_t>({-1}))
      ->excludes(adapter);
}

void declare_generation(CLI::App& app, Options& options) {
  GenerationOptions& generation = options.generation;
  SamplingOptions& sampling = generation.sampling;
  add_number(app, "--max-new-tokens", generation.max_new_tokens, "how many tokens to write (20)", 1);
  app.add_option("--stop", options.stop, "token ids that end a sequence: 2,50256")
      ->delimiter(',')
      ->transform(number<int64_t>({0}));
  auto* sample = app.add_flag("--sample", options.sample, "draw tokens (without it the likeliest is taken)");
  add_number(app, "--temperature", sampling.temperature, "divides the logits (1)", std::numeric_limits<double>::min())
      ->needs(sample);
  add_number(app, "--top-k", sampling.top_k, "draw among so many tokens", 1)->needs(sample);
  add_number(app, "--top-p", sampling.top_p, "draw among the likeliest tokens of this probability", 1e-9, 1.0)
      ->needs(sample);
  add_number(app, "--seed", sampling.seed, "of the random numbers (0)")->needs(sample);
  auto* beams = add_number(app, "--num-beams", options.beams.num_beams, "search with so many beams (1: none)", 2, 64)
                    ->excludes(sample);
  add_number(app, "--length-penalty", options.beams.length_penalty, "above 0: longer ones score better (1)")
      ->needs(beams);
  app.add_flag("--early-stopping", options.beams.early_stopping, "end when as many sequences have ended as beams")
      ->needs(beams);
  app.add_flag("--stream", options.stream, "print \"ROW TOKEN\" as soon as each token is known")->excludes(beams);
  app.add_option("--output", options.output, R"(write {"tokens": [[...], ...]} to this file)");
  add_number(app, "--threads", options.threads, "threads for each operator (libtorch's default)", 1);
  add_quantized_engine(app);
}

void print(const std::vector<Tokens>& tokens) {
  for (size_t row = 0; row < tokens.size(); ++row) {
    std::cout << row << ":";
    for (const int64_t token : tokens[row]) {
      std::cout << " " << token;
    }
    std::cout << "\n";
  }
}

void run(Options& options) {
  if (options.threads > 0) {
    at::set_num_threads(options.threads);
  }
  options.generation.sampling.greedy = !options.sample;
  options.generation.stop.insert(options.stop.begin(), options.stop.end());
  const std::vector<Tokens> prompts = read_prompts(options.prompts);
  torch::jit::Module module = load_decoder(options.model);
  const Decoder decoder(module, options.model, options.form);
  if (!options.adapter.empty()) {
    if (!module.find_method("activate")) {
      throw std::runtime_error(options.model + ": the model has no adapters; graft some onto it with torchgraft add");
    }
    module.run_method("activate", options.adapter);
  }
  const std::vector<Tokens> tokens =
      options.beams.num_beams > 1 ? generate_by_beams(decoder, prompts, options.generation, options.beams)
                                  : generate(decoder, prompts, options.generation, [&](int64_t row, int64_t token) {
                                      if (options.stream) {
                                        std::cout << row << " " << token << std::endl;
                                      }
                                    });
  if (!options.stream) {
    print(tokens);
  }
  if (!options.output.empty()) {
    write_tokens(options.output, tokens);
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Continues prompts with a grafted decoder; each sequence can have its own adapter.", "generate");
  Options options;
  declare(app, options);
  declare_generation(app, options);
  try {
    app.parse(argc, argv);
    run(options);
    return 0;
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::cerr << "generate: " << torchgraft::one_line(error) << " (generate --help)\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "generate: " << torchgraft::one_line(error) << "\n";
  }
  return 1;
}
