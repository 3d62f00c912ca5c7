# Every outside library is found here, once.
# LibTorch is the one that CMAKE_PREFIX_PATH names; else that of the Python environment.
include(cmake/torchgraftTorch.cmake)
torchgraft_find_torch()
if(NOT TORCH_INSTALL_PREFIX)
  find_package(Python3 3.11 COMPONENTS Interpreter REQUIRED)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/find_torch.py
    OUTPUT_VARIABLE torch_found OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_VARIABLE torch_missing RESULT_VARIABLE torch_failed)
  if(torch_failed)
    message(FATAL_ERROR "${Python3_EXECUTABLE}: ${torch_missing} In a checkout, scripts/setup installs torch; "
                        "-DCMAKE_PREFIX_PATH=<libtorch> names another one.")
  endif()
  string(REGEX REPLACE "\n.*" "" torch_folder "${torch_found}")
  torchgraft_find_torch(${torch_folder})
endif()
if(NOT TORCH_INSTALL_PREFIX OR Torch_VERSION VERSION_LESS 2.13)
  message(FATAL_ERROR "expected LibTorch 2.13 or later, got '${Torch_VERSION}' in '${TORCH_INSTALL_PREFIX}'")
endif()
torchgraft_import_torch()
# Without OpenMP's flags at::parallel_for in a plug-in is silently serial.
find_package(OpenMP REQUIRED COMPONENTS CXX)

# Headers only: of the system, of the Python package nlohmann-json (a build by pip), or downloaded.
find_package(nlohmann_json 3.11 QUIET)
if(NOT nlohmann_json_FOUND)
  find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp HINTS ${CMAKE_PREFIX_PATH} PATH_SUFFIXES nlohmann_json/include)
endif()
if(NOT nlohmann_json_FOUND AND NLOHMANN_JSON_INCLUDE_DIR)
  add_library(nlohmann_json::nlohmann_json INTERFACE IMPORTED)
  target_include_directories(nlohmann_json::nlohmann_json INTERFACE ${NLOHMANN_JSON_INCLUDE_DIR})
elseif(NOT nlohmann_json_FOUND)
  include(FetchContent)
  FetchContent_Declare(nlohmann_json GIT_REPOSITORY https://github.com/nlohmann/json GIT_TAG v3.11.3)
  FetchContent_MakeAvailable(nlohmann_json)
endif()

if(TORCHGRAFT_BUILD_TESTS)
  find_package(GTest QUIET)
  if(NOT GTest_FOUND)
    include(FetchContent)
    FetchContent_Declare(googletest GIT_REPOSITORY https://github.com/google/googletest GIT_TAG v1.15.2)
    FetchContent_MakeAvailable(googletest)
  endif()
endif()

if(TORCHGRAFT_BUILD_BENCHMARKS)
  find_package(benchmark QUIET)
  if(NOT benchmark_FOUND)
    include(FetchContent)
    set(BENCHMARK_ENABLE_TESTING OFF CACHE BOOL "" FORCE)
    FetchContent_Declare(benchmark GIT_REPOSITORY https://github.com/google/benchmark GIT_TAG v1.9.1)
    FetchContent_MakeAvailable(benchmark)
  endif()
endif()
