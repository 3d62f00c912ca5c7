# Every outside library is found here, once.
# LibTorch comes from the Python wheel unless CMAKE_PREFIX_PATH already names one.
find_package(Torch 2.13 QUIET)
if(NOT Torch_FOUND)
  find_package(Python3 3.11 COMPONENTS Interpreter REQUIRED)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c "import torch; print(torch.utils.cmake_prefix_path)"
    OUTPUT_VARIABLE torch_prefix OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE torch_missing)
  if(torch_missing)
    message(FATAL_ERROR "torch is not importable from ${Python3_EXECUTABLE}; run scripts/setup, or give "
                        "-DCMAKE_PREFIX_PATH=<libtorch>")
  endif()
  list(APPEND CMAKE_PREFIX_PATH ${torch_prefix})
endif()
find_package(Torch 2.13 REQUIRED)
# Without OpenMP's flags at::parallel_for in a plug-in is silently serial.
find_package(OpenMP REQUIRED COMPONENTS CXX)

# Headers only.
find_package(nlohmann_json 3.11 QUIET)
if(NOT nlohmann_json_FOUND)
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
