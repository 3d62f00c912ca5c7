# What every library of this project has in common.
function(torchgraft_library target)
  target_include_directories(${target} PUBLIC
    $<BUILD_INTERFACE:${PROJECT_BINARY_DIR}/include>
    $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wno-unused-parameter)
endfunction()

# Compiles the sources of `target` in units of `sources_each`, in the order in which they are listed: LibTorch's
# headers, which take ten times as long as a source of ours, are then read once for each unit. Names in anonymous
# namespaces must differ within a target.
function(torchgraft_few_units target sources_each)
  if(TORCHGRAFT_UNITY)
    set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE ${sources_each})
  endif()
endfunction()

# Headers that each source reads, parsed once. Few units need none: a precompiled header of LibTorch's is half a
# gigabyte, and takes longer to make than two units take to read the headers.
function(torchgraft_precompiled_headers target)
  if(NOT TORCHGRAFT_UNITY)
    target_precompile_headers(${target} PRIVATE ${ARGN})
  endif()
endfunction()

# For code that runs once for a model, not once for a token: nobody sees what -O3 gains there, and it costs a third of
# the compile time.
function(torchgraft_light_optimisation target)
  target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:-O1>)
endfunction()

# torchgraft_layer(TARGET KNOWN...): an object library whose sources can include these folders and headers of this
# project and no others, so that a layer that knows too much does not compile. LAYERS in scripts/check_tree.py says
# which, for these folders and for all others.
function(torchgraft_layer target)
  set(folder ${PROJECT_BINARY_DIR}/layers/${target})
  file(REMOVE_RECURSE ${folder})
  foreach(known IN LISTS ARGN)
    cmake_path(GET known PARENT_PATH parent)
    file(MAKE_DIRECTORY ${folder}/torchgraft/${parent})
    file(CREATE_LINK ${PROJECT_SOURCE_DIR}/${known} ${folder}/torchgraft/${known} SYMBOLIC)
  endforeach()
  target_include_directories(${target} PRIVATE ${folder})
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wno-unused-parameter)
  target_compile_features(${target} PRIVATE cxx_std_20)
  torchgraft_light_optimisation(${target})
endfunction()

set(torchgraft_flags_default)
set(torchgraft_flags_avx2 -mavx2 -mfma -mf16c -DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2)
set(torchgraft_flags_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -DCPU_CAPABILITY=AVX512
    -DCPU_CAPABILITY_AVX512)

# Compiles the sources into `target` once for each instruction set of the machine's family, each copy with
# TORCHGRAFT_INSTRUCTION_SET (default, avx2, avx512) defined; ops/cpu/kernels.cpp chooses one when it runs. ATen's
# vector types take their width from CPU_CAPABILITY_*.
function(torchgraft_vectorized target)
  set(sets default)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    list(APPEND sets avx2 avx512)
    target_compile_definitions(${target} PRIVATE TORCHGRAFT_X86)
  endif()
  foreach(instruction_set IN LISTS sets)
    torchgraft_vectorized_copy(${target} ${instruction_set} "${torchgraft_flags_${instruction_set}}" ${ARGN})
  endforeach()
endfunction()

# One copy, compiled with `flags`.
function(torchgraft_vectorized_copy target instruction_set flags)
  set(copy ${target}_${instruction_set})
  add_library(${copy} OBJECT ${ARGN})
  torchgraft_library(${copy})
  target_compile_features(${copy} PRIVATE cxx_std_20)
  target_link_libraries(${copy} PRIVATE torch OpenMP::OpenMP_CXX)
  target_compile_options(${copy} PRIVATE ${flags} -fno-math-errno -fno-trapping-math
    -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized)  # g++ 12 on its own intrinsics
  target_compile_definitions(${copy} PRIVATE TORCHGRAFT_INSTRUCTION_SET=${instruction_set})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${copy}>)
  set_property(TARGET ${target} APPEND PROPERTY TORCHGRAFT_COPIES ${copy})
endfunction()

# The same for what only processors with AVX512-BF16 can run, in a namespace of its own.
# To be called after torchgraft_vectorized: of inline functions that have a copy in each, the linker keeps the first.
function(torchgraft_vectorized_avx512_bf16 target)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    torchgraft_vectorized_copy(${target} avx512_bf16 "${torchgraft_flags_avx512};-mavx512bf16" ${ARGN})
  endif()
endfunction()
