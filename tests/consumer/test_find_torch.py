"""Which LibTorch a build and a host take, of several; and what a host can say beside find_package(torchgraft)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hosts_support import ROOT, attempt, run

pytestmark = pytest.mark.quick

MINOR = ".".join(torch.__version__.split(".")[:2])
OWN = Path(torch.__file__).parent


def fake_torch(folder: Path, version: str) -> Path:
    """A LibTorch of which nothing but the version is read."""
    file = folder / "share" / "cmake" / "Torch" / "TorchConfigVersion.cmake"
    file.parent.mkdir(parents=True)
    file.write_text(f'set(PACKAGE_VERSION "{version}")\n')
    return folder


def build_takes(tmp_path: Path, settings: str) -> subprocess.CompletedProcess:
    """What the build's own search finds, with variables set as `settings` says."""
    script = tmp_path / "find.cmake"
    script.write_text(
        f'cmake_minimum_required(VERSION 3.25)\nset(Python3_EXECUTABLE "{sys.executable}")\n{settings}\n'
        f'include("{ROOT}/cmake/torch_to_build_with.cmake")\n'
        'message(NOTICE "${TORCH_INSTALL_PREFIX} ${Torch_VERSION}")\n'
    )
    return attempt("cmake", "-P", script)


@pytest.mark.parametrize("version", ["2.6.0", "2.99.0"])
def test_a_libtorch_of_the_system_hides_the_users_torch_from_no_build(version, tmp_path):
    system = fake_torch(tmp_path / "usr", version)
    found = build_takes(tmp_path, f'set(CMAKE_SYSTEM_PREFIX_PATH "{system}")').stderr
    assert found.split() == [str(OWN), torch.__version__.partition("+")[0]]


def test_a_build_passes_over_a_libtorch_that_is_too_old(tmp_path):
    old, new = fake_torch(tmp_path / "old", "2.12.0"), fake_torch(tmp_path / "new", "2.98.0")
    found = build_takes(tmp_path, f'set(CMAKE_PREFIX_PATH "{old}" "{new}")').stderr
    assert found.split() == [str(new), "2.98.0"]
    found = build_takes(tmp_path, f'set(CMAKE_PREFIX_PATH "{old}")').stderr
    assert found.split()[0] == str(OWN)


def test_a_wheel_is_built_with_the_torch_that_it_asks_for(tmp_path):
    """cmake/find_torch.py writes the requirement: CMAKE_PREFIX_PATH must not give the libraries another torch."""
    other = fake_torch(tmp_path / "other", "2.98.0")
    found = build_takes(tmp_path, f'set(CMAKE_PREFIX_PATH "{other}")\nset(SKBUILD 2)').stderr
    assert found.split()[0] == str(OWN)


def test_the_least_torch_of_builds_is_the_least_torch_of_wheels():
    builds = (ROOT / "cmake" / "torch_to_build_with.cmake").read_text()
    wheels = (ROOT / "cmake" / "find_torch.py").read_text()
    least = builds.partition("set(torchgraft_least_torch ")[2].partition(")")[0]
    assert least and f'LEAST = "{least}"' in wheels


@pytest.mark.parametrize(
    ("libdir", "includedir"), [("lib", "include"), ("lib64", "include"), ("lib/x86_64-linux-gnu", "include/deep")]
)
def test_pkg_config_finds_the_installation_in_any_library_folder(libdir, includedir, tmp_path):
    folder = tmp_path / "prefix" / libdir / "pkgconfig"
    script = tmp_path / "write.cmake"
    script.write_text(
        f'cmake_minimum_required(VERSION 3.25)\nset(CMAKE_INSTALL_LIBDIR "{libdir}")\n'
        f'set(CMAKE_INSTALL_INCLUDEDIR "{includedir}")\nset(PROJECT_VERSION 1.2)\n'
        f'include("{ROOT}/cmake/pkg_config.cmake")\ntorchgraft_write_pc("{folder}/torchgraft.pc" "/of/torch")\n'
    )
    run("cmake", "-P", script)
    shown = {}
    for name in ("prefix", "libdir", "includedir"):
        value = run("pkg-config", f"--variable={name}", folder / "torchgraft.pc").stdout.strip()
        shown[name] = Path(value).resolve()
    prefix = tmp_path / "prefix"
    assert shown == {"prefix": prefix, "libdir": prefix / libdir, "includedir": prefix / includedir}
    flags = run("pkg-config", "--cflags", "--libs", folder / "torchgraft.pc").stdout
    assert "-I/of/torch/include" in flags and "-L/of/torch/lib" in flags


def test_libraries_for_another_torch_are_not_packed(tmp_path):
    """After an upgrade of torch a wheel of an older build would ask for the new one."""
    built = tmp_path / "built"
    (built / "lib").mkdir(parents=True)
    suffix = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))").stdout.strip()
    (built / "lib" / f"_C{suffix}").touch()

    def configured(version: str) -> subprocess.CompletedProcess:
        (built / "lib" / "torchgraft_torch_version.txt").write_text(version + "\n")
        python = f"-DPython3_EXECUTABLE={sys.executable}"
        return attempt("cmake", "-S", ROOT, "-B", tmp_path / "build", python, f"-DTORCHGRAFT_BUILT={built}")

    refused = configured("2.1.2")
    assert refused.returncode != 0
    assert f"libraries for torch 2.1.2, and this Python has torch {MINOR}" in " ".join(refused.stderr.split())
    taken = configured(torch.__version__)
    assert taken.returncode == 0, taken.stderr


HOST = "add_executable({name} ../main.cpp)\ntarget_link_libraries({name} PRIVATE {linked})\n"
SAYS = {
    "first": ("find_package(torchgraft REQUIRED)\n", "torchgraft::torchgraft"),
    "second": ("find_package(torchgraft REQUIRED)\n", "torchgraft::torchgraft ${TORCH_LIBRARIES}"),
    "before": (
        "find_package(torchgraft REQUIRED)\nfind_package(Torch REQUIRED)\n",
        "torchgraft::torchgraft ${TORCH_LIBRARIES}",
    ),
    "after": (
        "find_package(Torch REQUIRED)\nfind_package(torchgraft REQUIRED)\n",
        "torchgraft::torchgraft ${TORCH_LIBRARIES}",
    ),
    "twice": ("find_package(torchgraft REQUIRED)\nfind_package(torchgraft REQUIRED)\n", "torchgraft::torchgraft"),
}


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_host_finds_torchgraft_in_siblings_and_beside_torch(everywhere, prefix, tmp_path):
    (tmp_path / "main.cpp").write_text("int main() {}\n")
    lines = "cmake_minimum_required(VERSION 3.25)\nproject(host LANGUAGES CXX)\nset(CMAKE_CXX_STANDARD 20)\n"
    if everywhere:  # finds in the parent folder; its targets are known to all
        lines += "set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL ON)\n"
    for name, (says, linked) in SAYS.items():
        if everywhere and "Torch" in says:
            continue  # torch's own package does not stand that twice
        (tmp_path / name).mkdir()
        (tmp_path / name / "CMakeLists.txt").write_text(
            f'{says}message(NOTICE "{name}: ${{TORCH_INSTALL_PREFIX}} ${{Torch_VERSION}}")\n'
            + HOST.format(name=name, linked=linked)
        )
        lines += f"add_subdirectory({name})\n"
    (tmp_path / "CMakeLists.txt").write_text(lines)
    search = f"-DCMAKE_PREFIX_PATH={prefix};{torch.utils.cmake_prefix_path}"
    configured = run("cmake", "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", search)
    found = [line.split()[1] for line in configured.stderr.splitlines() if line.split(":")[0] in SAYS]
    assert found and set(found) == {str(OWN)}
    run("cmake", "--build", tmp_path / "build")


def test_a_host_that_has_found_another_torch_is_refused(prefix, tmp_path):
    """And gets no second one beside it."""
    other = fake_torch(tmp_path / "other", "2.12.1")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(host LANGUAGES NONE)\n"
        "add_library(torch_cpu SHARED IMPORTED)\n"
        f'set_target_properties(torch_cpu PROPERTIES IMPORTED_LOCATION "{other}/lib/libtorch_cpu.so")\n'
        "find_package(torchgraft REQUIRED)\n"
    )
    search = f"-DCMAKE_PREFIX_PATH={prefix};{torch.utils.cmake_prefix_path}"
    refused = attempt("cmake", "-S", tmp_path, "-B", tmp_path / "build", search)
    assert refused.returncode != 0 and "found 2.12.1" in " ".join(refused.stderr.split())
