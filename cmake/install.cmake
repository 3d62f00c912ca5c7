# What `cmake --install` puts in place, for hosts that say find_package(torchgraft).
include(CMakePackageConfigHelpers)

# A host that runs a grafted module through torch::jit uses no symbol of libtorchgraft, so a linker under --as-needed
# (a distribution's default, and what torch's own targets switch to behind themselves) drops the library and the
# operators are missing when the program runs. One item that carries its own flags does not depend on its place in the
# link line. The library's file name is known to the alias here and to the imported target of the same name there.
# LibTorch's libraries stand beside it: where they lie is for the host to say, and libtorchgraft does not know.
string(CONCAT torchgraft_kept "-Wl,--push-state,--no-as-needed,$<TARGET_FILE:torchgraft::torchgraft>,"
  "$<TARGET_FILE:torchgraft::torch_cpu>,$<TARGET_FILE:torchgraft::c10>,--pop-state")
target_link_libraries(torchgraft INTERFACE "${torchgraft_kept}")

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
  ops/linear.h
  ops/reft.h
  ops/residual_norm.h
  registration/error_text.h
  registration/export.h
  registration/library.h
  registration/parse_json.h
  registration/tensor_records.h)
if(TORCHGRAFT_BUILD_PATCH)
  list(APPEND torchgraft_targets torchgraft_patch)
  list(APPEND torchgraft_headers
    config/adapter_config.h
    config/check_supported.h
    config/composition.h
    config/composition_string.h
    config/config_json.h
    config/config_string.h
    config/config_union.h
    config/fusion_config.h
    config/gate_pooling.h
    config/head_config.h
    config/library_differences.h
    config/method_configs.h
    config/named_configs.h
    config/reft_config.h
    patch/adapter_pool.h
    patch/base_digest.h
    patch/check_room.h
    patch/compose.h
    patch/forward_inputs.h
    patch/fusion.h
    patch/graft.h
    patch/graft_spec.h
    patch/head.h
    patch/inspect.h
    patch/life.h
    patch/list_adapters.h
    patch/load_module.h
    patch/optimize.h
    patch/quantize.h
    patch/read_adapter.h
    patch/save_adapter.h
    patch/text_limits.h
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

# Installed libraries look for libtorch where the host has loaded it, and beside themselves: in a wheel, where torch is
# the folder beside torchgraft's. Nothing of the machine that built them stays.
set(torchgraft_rpath "$ORIGIN;$ORIGIN/../../torch/lib")
set_target_properties(${torchgraft_targets} PROPERTIES INSTALL_RPATH "${torchgraft_rpath}")

# Which torch the libraries were built for: python/torchgraft/_libraries.py compares, before it loads them.
file(WRITE ${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/torchgraft_torch_version.txt "${Torch_VERSION}\n")

# Components: `torchgraft`, what a wheel and a prefix both have; `torchgraft_local`, what only a prefix on this machine
# has; `torchgraft_python`, what only a wheel has.
install(TARGETS ${torchgraft_targets} EXPORT torchgraftTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT torchgraft
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT torchgraft)
install(FILES ${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/torchgraft_torch_version.txt DESTINATION ${CMAKE_INSTALL_LIBDIR}
  COMPONENT torchgraft)
foreach(header IN LISTS torchgraft_headers)
  cmake_path(GET header PARENT_PATH folder)
  install(FILES ${PROJECT_SOURCE_DIR}/${header} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/torchgraft/${folder}
    COMPONENT torchgraft)
endforeach()
if(TORCHGRAFT_BUILD_PYTHON)
  set_target_properties(torchgraft_python PROPERTIES INSTALL_RPATH "${torchgraft_rpath}")
  install(TARGETS torchgraft_python LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT torchgraft_python
    EXCLUDE_FROM_ALL)
endif()

# find_package(torchgraft) works on the build folder, too. An older build may have left its package at the top, where
# CMake looks first.
file(REMOVE ${PROJECT_BINARY_DIR}/torchgraftConfig.cmake ${PROJECT_BINARY_DIR}/torchgraftConfigVersion.cmake)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_minor_version "${Torch_VERSION}")
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/torchgraft)
set(built_package_dir ${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/cmake/torchgraft)
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/torchgraftConfig.cmake.in
  ${built_package_dir}/torchgraftConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${built_package_dir}/torchgraftConfigVersion.cmake COMPATIBILITY SameMinorVersion)
file(COPY ${PROJECT_SOURCE_DIR}/cmake/torchgraftTorch.cmake DESTINATION ${built_package_dir})
file(WRITE ${built_package_dir}/torchgraftBuiltWith.cmake "set(torchgraft_built_with \"${TORCH_INSTALL_PREFIX}\")\n")
export(EXPORT torchgraftTargets NAMESPACE torchgraft:: FILE ${built_package_dir}/torchgraftTargets.cmake)
install(EXPORT torchgraftTargets NAMESPACE torchgraft:: DESTINATION ${package_dir} COMPONENT torchgraft)
install(FILES ${built_package_dir}/torchgraftConfig.cmake ${built_package_dir}/torchgraftConfigVersion.cmake
  ${built_package_dir}/torchgraftTorch.cmake DESTINATION ${package_dir} COMPONENT torchgraft)
install(FILES ${built_package_dir}/torchgraftBuiltWith.cmake DESTINATION ${package_dir} COMPONENT torchgraft_local)

# pkg-config: in a wheel torch is the folder beside torchgraft's, in a prefix the one that it was built with.
include(cmake/pkg_config.cmake)
torchgraft_write_pc(${PROJECT_BINARY_DIR}/pkgconfig/wheel.pc "\${prefix}/../torch")
torchgraft_write_pc(${PROJECT_BINARY_DIR}/pkgconfig/local.pc ${TORCH_INSTALL_PREFIX})
install(FILES ${PROJECT_BINARY_DIR}/pkgconfig/wheel.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig
  RENAME torchgraft.pc COMPONENT torchgraft)
install(FILES ${PROJECT_BINARY_DIR}/pkgconfig/local.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig
  RENAME torchgraft.pc COMPONENT torchgraft_local)
