# What `cmake --install` puts in place, for hosts that say find_package(torchgraft).
include(CMakePackageConfigHelpers)

# A host that runs a grafted module through torch::jit uses no symbol of libtorchgraft, so a linker under --as-needed
# (a distribution's default, and what torch's own targets switch to behind themselves) drops the library and the
# operators are missing when the program runs. One item that carries its own flags does not depend on its place in the
# link line. The library's file name is known to the alias here and to the imported target of the same name there.
target_link_libraries(torchgraft INTERFACE
  "-Wl,--push-state,--no-as-needed,$<TARGET_FILE:torchgraft::torchgraft>,--pop-state")

set(torchgraft_targets torchgraft)
set(torchgraft_headers
  activations/activation.h
  ops/activation.h
  ops/attention_token_mask.h
  ops/gated_bottleneck.h
  ops/gated_bottleneck_linear.h
  ops/gated_lora.h
  ops/gated_lora_linear.h
  ops/kernel_mode.h
  ops/gated_prefix_attention.h
  registration/error_text.h
  registration/export.h
  registration/library.h
  registration/parse_json.h)
if(TORCHGRAFT_BUILD_PATCH)
  list(APPEND torchgraft_targets torchgraft_patch)
  list(APPEND torchgraft_headers
    config/adapter_config.h
    config/check_supported.h
    config/config_json.h
    config/config_string.h
    config/config_union.h
    config/head_config.h
    config/library_differences.h
    config/method_configs.h
    config/named_configs.h
    patch/adapter_pool.h
    patch/check_room.h
    patch/forward_inputs.h
    patch/graft.h
    patch/graft_spec.h
    patch/head.h
    patch/inspect.h
    patch/life.h
    patch/load_module.h
    patch/quantize.h
    patch/save_adapter.h
    patch/train.h
    patch/verify.h
    plan/adapter_weights.h
    plan/init_weights.h
    plan/module_weights.h
    plan/plan.h
    plan/read_adapter_hub.h
    plan/regular_file.h
    plan/safetensors.h
    plan/structure.h
    plan/temporary_file.h)
endif()

# Installed libraries look for libtorch where the host does, then where this build found it, so that a Python-less host
# linked against the same libtorch starts without LD_LIBRARY_PATH.
set_target_properties(${torchgraft_targets} PROPERTIES
  INSTALL_RPATH "$ORIGIN;${TORCH_INSTALL_PREFIX}/lib")

install(TARGETS ${torchgraft_targets} EXPORT torchgraftTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
foreach(header IN LISTS torchgraft_headers)
  cmake_path(GET header PARENT_PATH folder)
  install(FILES ${PROJECT_SOURCE_DIR}/${header} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/torchgraft/${folder})
endforeach()

string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_minor_version "${Torch_VERSION}")
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/torchgraft)
install(EXPORT torchgraftTargets NAMESPACE torchgraft:: DESTINATION ${package_dir})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/torchgraftConfig.cmake.in
  ${PROJECT_BINARY_DIR}/torchgraftConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/torchgraftConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/torchgraftConfig.cmake ${PROJECT_BINARY_DIR}/torchgraftConfigVersion.cmake
  DESTINATION ${package_dir})
