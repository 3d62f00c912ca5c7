# The LibTorch that the libraries are built with: sets TORCH_INSTALL_PREFIX and Torch_VERSION. Outside of a wheel it is
# the one that CMAKE_PREFIX_PATH names; else, and always in a wheel, that of the Python environment: find_torch.py
# writes its version into the wheel's requirements. A LibTorch in a folder of the system has to be named.
include(${CMAKE_CURRENT_LIST_DIR}/torchgraftTorch.cmake)
set(torchgraft_least_torch 2.13)  # also in cmake/find_torch.py
set(TORCH_INSTALL_PREFIX "")
if(NOT SKBUILD)
  torchgraft_named_folders(torch_folders)
  torchgraft_find_torch(${torchgraft_least_torch} ${torch_folders})
endif()
if(NOT TORCH_INSTALL_PREFIX)
  find_package(Python3 3.11 COMPONENTS Interpreter REQUIRED)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_torch.py
    OUTPUT_VARIABLE torch_found OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_VARIABLE torch_missing ERROR_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_failed)
  if(torch_failed)
    message(FATAL_ERROR "${Python3_EXECUTABLE}: ${torch_missing}. In a checkout, scripts/setup installs torch; "
                        "-DCMAKE_PREFIX_PATH=<libtorch> names another one${torchgraft_older_torch}")
  endif()
  string(REGEX REPLACE "\n.*" "" torch_folder "${torch_found}")
  torchgraft_find_torch(${torchgraft_least_torch} ${torch_folder})
  if(NOT TORCH_INSTALL_PREFIX)
    message(FATAL_ERROR "expected LibTorch ${torchgraft_least_torch} or later in ${torch_folder}, which is the torch "
                        "of ${Python3_EXECUTABLE}${torchgraft_older_torch}")
  endif()
endif()
