# Instead of building: installs what the build folder TORCHGRAFT_BUILT holds, whose Python and torch must be these:
# find_torch.py writes the minor version of this torch into the wheel's requirements.
get_filename_component(built ${TORCHGRAFT_BUILT} ABSOLUTE BASE_DIR ${PROJECT_SOURCE_DIR})
find_package(Python3 COMPONENTS Interpreter Development.Module REQUIRED)
if(NOT EXISTS ${built}/lib/_C.${Python3_SOABI}.so)
  message(FATAL_ERROR "TORCHGRAFT_BUILT: ${built} holds no build for this Python: lib/_C.${Python3_SOABI}.so is "
                      "missing. Run scripts/setup with this Python, or leave TORCHGRAFT_BUILT out")
endif()
execute_process(COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_torch.py
  OUTPUT_VARIABLE torch_found OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
file(STRINGS ${built}/lib/torchgraft_torch_version.txt torch_built LIMIT_COUNT 1)
string(REGEX REPLACE ".*\n([0-9]+\\.[0-9]+).*" "\\1" torch_minor "${torch_found}")
if(NOT "${torch_built}." MATCHES "^${torch_minor}\\.")
  message(FATAL_ERROR "TORCHGRAFT_BUILT: ${built} holds libraries for torch ${torch_built}, and this Python has torch "
                      "${torch_minor}. Run scripts/setup again, or leave TORCHGRAFT_BUILT out")
endif()
foreach(target torchgraft torchgraft_patch torchgraft_python)
  add_custom_target(${target})  # pyproject.toml names what a wheel builds
endforeach()
foreach(component torchgraft torchgraft_python)
  install(CODE "
    execute_process(
      COMMAND \"${CMAKE_COMMAND}\" --install \"${built}\" --component ${component} --prefix \"\${CMAKE_INSTALL_PREFIX}\"
      COMMAND_ERROR_IS_FATAL ANY)" COMPONENT ${component})
endforeach()
