// The command line of the server.
#pragma once

#include "decoder.h"
#include "generate_service.h"
#include "http_server.h"
#include "service.h"

#include <torchgraft/patch/adapter_pool.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

struct Options {
  std::string model;
  std::string package;
  std::string adapters;
  std::vector<std::string> libraries;
  std::string address = "127.0.0.1";
  uint16_t port = 8080;
  torchgraft::AdapterPoolOptions pool;
  bool has_capacity = false;
  uint64_t adapter_file_bytes = uint64_t{1} << 30;
  int threads = 0;
  int64_t wait_us = 2000;
  int64_t adapter_wait_ms = 30'000;
  unsigned drain_seconds = 30;
  ServiceOptions service;
  DecoderForm form;
  GenerateOptions generate;
  HttpLimits http;
  std::vector<std::string> given;  // options that have a meaning for one kind of model only
};

// Adds every option to `app`, which writes into `options` when it parses.
void declare(CLI::App& app, Options& options);

// Notes which options were given, after parsing. Throws CLI::ValidationError for those that exclude each other.
void note_given(const CLI::App& app, Options& options);

// Throws CLI::ValidationError for values that do not go together.
void check(const Options& options);

// Throws CLI::ValidationError for an option that has no meaning for this kind of model.
void check_given(const Options& options, bool is_decoder);
