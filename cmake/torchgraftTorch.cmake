# LibTorch as the imported target `torchgraft::torch`, from the folder of a Python wheel or of an unpacked LibTorch.
#
# torch's own package asks for everything that torch was built with: with a CUDA build of torch it stops where there is
# no CUDA toolkit. Linking needs the libraries and the headers alone. Used by the build and, installed beside
# torchgraftConfig.cmake, by hosts. Those can say find_package(Torch), too, before or after: the names differ.

# torchgraft_find_torch(LEAST FOLDERS...): sets TORCH_INSTALL_PREFIX and Torch_VERSION, in the caller's scope, for the
# first LibTorch in FOLDERS of version LEAST or later; leaves TORCH_INSTALL_PREFIX empty if there is none. Sets
# torchgraft_older_torch to the ones before it that are older, as text for an error.
function(torchgraft_find_torch least)
  set(TORCH_INSTALL_PREFIX "" PARENT_SCOPE)
  set(older "")
  set(found "")
  foreach(folder IN LISTS ARGN)
    foreach(inside "" /Torch /share/cmake/Torch)
      set(file "${folder}${inside}/TorchConfigVersion.cmake")
      if(found OR NOT EXISTS "${file}")
        continue()
      endif()
      include("${file}")
      cmake_path(SET prefix NORMALIZE "${folder}${inside}/../../..")
      string(REGEX REPLACE "/$" "" prefix "${prefix}")
      if(PACKAGE_VERSION VERSION_LESS least)
        string(APPEND older "; found ${PACKAGE_VERSION} in ${prefix}")
      else()
        set(found ${prefix})
        set(TORCH_INSTALL_PREFIX ${prefix} PARENT_SCOPE)
        set(Torch_VERSION ${PACKAGE_VERSION} PARENT_SCOPE)
      endif()
    endforeach()
  endforeach()
  set(torchgraft_older_torch "${older}" PARENT_SCOPE)
endfunction()

# torchgraft_named_folders(OUT): the folders that the user names for LibTorch, and those of no system.
function(torchgraft_named_folders out)
  string(REPLACE ":" ";" from_environment "$ENV{CMAKE_PREFIX_PATH}")
  set(${out} ${Torch_DIR} ${Torch_ROOT} ${CMAKE_PREFIX_PATH} ${from_environment} PARENT_SCOPE)
endfunction()

# Makes the targets torchgraft::torch, torchgraft::torch_cpu and torchgraft::c10 of the LibTorch in
# TORCH_INSTALL_PREFIX, if there are none yet. The first one keeps the prefix and the version as its properties
# TORCH_INSTALL_PREFIX and Torch_VERSION. A program that links it also loads CUDA's operators, if torch has them: it
# uses no symbol of theirs, so the linker has to be told.
function(torchgraft_import_torch)
  if(TARGET torchgraft::torch)
    return()
  endif()
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
    add_library(torchgraft::${name} SHARED IMPORTED)
    set_target_properties(torchgraft::${name} PROPERTIES
      IMPORTED_LOCATION ${lib}/lib${name}.so
      INTERFACE_COMPILE_DEFINITIONS "${definitions}"
      INTERFACE_INCLUDE_DIRECTORIES "${include};${include}/torch/csrc/api/include")
  endforeach()
  add_library(torchgraft::torch INTERFACE IMPORTED)
  target_link_libraries(torchgraft::torch INTERFACE torchgraft::torch_cpu torchgraft::c10)
  set_target_properties(torchgraft::torch PROPERTIES
    TORCH_INSTALL_PREFIX "${TORCH_INSTALL_PREFIX}" Torch_VERSION "${Torch_VERSION}")
  set(accelerated "")
  foreach(name torch_cuda c10_cuda)
    if(EXISTS ${lib}/lib${name}.so)
      string(APPEND accelerated ",${lib}/lib${name}.so")
    endif()
  endforeach()
  if(accelerated)
    target_link_libraries(torchgraft::torch INTERFACE
      "$<$<STREQUAL:$<TARGET_PROPERTY:TYPE>,EXECUTABLE>:-Wl,--push-state,--no-as-needed${accelerated},--pop-state>")
  endif()
endfunction()
