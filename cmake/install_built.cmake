# Instead of building: installs what the build folder TORCHGRAFT_BUILT holds, whose Python must be this one.
get_filename_component(built ${TORCHGRAFT_BUILT} ABSOLUTE BASE_DIR ${PROJECT_SOURCE_DIR})
find_package(Python3 COMPONENTS Interpreter Development.Module REQUIRED)
if(NOT EXISTS ${built}/lib/_C.${Python3_SOABI}.so)
  message(FATAL_ERROR "TORCHGRAFT_BUILT: ${built} holds no build for this Python: lib/_C.${Python3_SOABI}.so is "
                      "missing. Run scripts/setup with this Python, or leave TORCHGRAFT_BUILT out")
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
