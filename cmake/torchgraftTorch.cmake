# LibTorch as the imported target `torch`, from the folder of a Python wheel or of an unpacked LibTorch.
#
# torch's own package asks for everything that torch was built with: with a CUDA build of torch it stops where there is
# no CUDA toolkit. Linking needs the libraries and the headers alone. Used by the build and, installed beside
# torchgraftConfig.cmake, by hosts.

# torchgraft_find_torch(HINTS...): sets TORCH_INSTALL_PREFIX and Torch_VERSION, in the caller's scope, for the first
# LibTorch that Torch_DIR, Torch_ROOT, CMAKE_PREFIX_PATH or HINTS name; leaves TORCH_INSTALL_PREFIX empty if there is
# none.
function(torchgraft_find_torch)
  string(REPLACE ":" ";" from_environment "$ENV{CMAKE_PREFIX_PATH}")
  set(found "")
  foreach(folder IN LISTS Torch_DIR Torch_ROOT CMAKE_PREFIX_PATH from_environment ARGN CMAKE_SYSTEM_PREFIX_PATH)
    foreach(inside "" /Torch /share/cmake/Torch)
      if(NOT found AND EXISTS "${folder}${inside}/TorchConfigVersion.cmake")
        set(found "${folder}${inside}")
      endif()
    endforeach()
  endforeach()
  set(TORCH_INSTALL_PREFIX "" PARENT_SCOPE)
  if(found)
    include(${found}/TorchConfigVersion.cmake)
    set(Torch_VERSION ${PACKAGE_VERSION} PARENT_SCOPE)
    cmake_path(SET prefix NORMALIZE "${found}/../../..")
    string(REGEX REPLACE "/$" "" prefix "${prefix}")
    set(TORCH_INSTALL_PREFIX ${prefix} PARENT_SCOPE)
  endif()
endfunction()

# Makes the targets torch, torch_cpu and c10 of the LibTorch in TORCH_INSTALL_PREFIX. A program that links `torch` also
# loads CUDA's operators, if torch has them: it uses no symbol of theirs, so the linker has to be told.
function(torchgraft_import_torch)
  set(lib ${TORCH_INSTALL_PREFIX}/lib)
  set(include ${TORCH_INSTALL_PREFIX}/include)
  set(definitions "")
  # What torch itself was compiled with and its headers ask for.
  file(STRINGS ${TORCH_INSTALL_PREFIX}/share/cmake/Caffe2/Caffe2Targets.cmake lines
    REGEX "INTERFACE_COMPILE_DEFINITIONS \"[A-Z0-9_=;]+\"")
  foreach(line IN LISTS lines)
    string(REGEX REPLACE ".*\"(.*)\".*" "\\1" named "${line}")
    list(APPEND definitions ${named})
  endforeach()
  list(REMOVE_DUPLICATES definitions)
  foreach(name c10 torch_cpu)
    add_library(${name} SHARED IMPORTED GLOBAL)
    set_target_properties(${name} PROPERTIES
      IMPORTED_LOCATION ${lib}/lib${name}.so
      INTERFACE_COMPILE_DEFINITIONS "${definitions}"
      INTERFACE_INCLUDE_DIRECTORIES "${include};${include}/torch/csrc/api/include")
  endforeach()
  add_library(torch INTERFACE IMPORTED GLOBAL)
  target_link_libraries(torch INTERFACE torch_cpu c10)
  set(accelerated "")
  foreach(name torch_cuda c10_cuda)
    if(EXISTS ${lib}/lib${name}.so)
      string(APPEND accelerated ",${lib}/lib${name}.so")
    endif()
  endforeach()
  if(accelerated)
    target_link_libraries(torch INTERFACE
      "$<$<STREQUAL:$<TARGET_PROPERTY:TYPE>,EXECUTABLE>:-Wl,--push-state,--no-as-needed${accelerated},--pop-state>")
  endif()
endfunction()
