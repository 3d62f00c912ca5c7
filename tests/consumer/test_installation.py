"""What is installed, and what a C++ host outside the source tree can do with it."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from hosts_support import ROOT, attempt, run


class LowRank(nn.Module):
    """Calls an operator by name, as a grafted module does."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.full((1, 2, 8), 0.5))
        self.b = nn.Parameter(torch.full((1, 8, 2), 0.25))
        self.scaling = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.torchgraft.gated_lora(x, x, self.a, self.b, self.scaling)[0]


def needed(path: Path) -> list[str]:
    return re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", run("readelf", "-d", path).stdout)


def libraries(prefix: Path) -> list[Path]:
    return [next(prefix.glob(f"lib*/lib{name}.so")) for name in ("torchgraft", "torchgraft_patch")]


def test_libraries_link_no_python(prefix):
    for library in libraries(prefix):
        assert any(name.startswith("libtorch_cpu") for name in needed(library))
        assert not [name for name in needed(library) if "python" in name]


def test_libraries_look_for_others_beside_themselves_alone(prefix):
    for library in libraries(prefix):
        (path,) = re.findall(r"\(RUNPATH\)\s+Library runpath: \[(.*)\]", run("readelf", "-d", library).stdout)
        assert [folder for folder in path.split(":") if not folder.startswith("$ORIGIN")] == []


def test_operators_do_not_need_the_patcher(prefix):
    assert not [name for name in needed(libraries(prefix)[0]) if "torchgraft" in name]


@pytest.mark.quick
def test_only_marked_symbols_are_exported(prefix):
    """Weak and unique symbols are templates and inline functions of the headers of torch and the standard library."""
    linker_made = {"__bss_start", "_edata", "_end"}
    for library in libraries(prefix):
        lines = run("nm", "--dynamic", "--demangle", "--defined-only", library).stdout.splitlines()
        symbols = [line.split(maxsplit=2)[1:] for line in lines]
        strong = {name for kind, name in symbols if kind not in "WwVvu"} - linker_made
        assert strong
        assert [name for name in strong if not name.startswith("torchgraft::")] == []
        # No kernel, pass or helper: what lies in an unnamed namespace or a detail stays inside.
        assert [name for name in strong if "anonymous" in name or re.search(r"_kernels?\b", name)] == []


@pytest.mark.quick
def test_installed_headers_are_those_of_the_sources(prefix):
    installed = sorted(path.relative_to(prefix / "include" / "torchgraft") for path in prefix.rglob("*.h"))
    assert Path("ops/gated_lora.h") in installed and Path("patch/graft.h") in installed
    for header in installed:
        text = (ROOT / header).read_text()
        assert (prefix / "include" / "torchgraft" / header).read_text() == text
        for included in re.findall(r"#include <torchgraft/(.+)>", text):
            assert Path(included) in installed, f"{header} includes {included}, which is not installed"


def test_host_that_only_links_has_the_operators(hosts, tmp_path):
    assert "libtorchgraft.so" in needed(hosts / "linked_only")
    torch.jit.script(LowRank()).save(tmp_path / "low_rank.pt")
    # Ones of [2, 3, 8]: each value becomes 1 + 2 * 0.25 * (8 * 0.5) = 3.
    printed = run(hosts / "linked_only", tmp_path / "low_rank.pt", 2, 3, 8).stdout
    assert float(printed) == pytest.approx(3 * 2 * 3 * 8)


def test_host_reports_the_operators_own_error(hosts, tmp_path):
    torch.jit.script(LowRank()).save(tmp_path / "low_rank.pt")
    result = attempt(hosts / "linked_only", tmp_path / "low_rank.pt", 2, 3, 7)
    assert result.returncode == 1
    assert "gated_lora: expected" in result.stderr


def test_anchor_keeps_the_library_under_as_needed(hosts):
    assert "libtorchgraft.so" in needed(hosts / "anchored")
    assert run(hosts / "anchored").stdout.strip() == torchgraft.__version__


def test_host_calls_operators_as_functions(hosts):
    printed = run(hosts / "calls_ops").stdout
    assert printed.startswith(torchgraft.__version__)
    assert "gated_lora: expected lora_a" in printed


def test_host_grafts_without_python(hosts, tmp_path):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    torch.jit.script(nn.TransformerEncoder(layer, 2).eval()).save(tmp_path / "base.pt")
    printed = run(hosts / "grafts", tmp_path / "base.pt", tmp_path / "grafted.pt").stdout
    assert printed == "2 layers\n"
    assert not [name for name in needed(hosts / "grafts") if "python" in name]
    grafted = torch.jit.load(tmp_path / "grafted.pt")
    assert grafted.adapter_names() == ["task"]
    # A fresh UniPELT differs from its base by its prefix alone; ids of -1 give the base back.
    x = torch.randn(3, 5, 16)
    base = torch.jit.load(tmp_path / "base.pt")(x)
    assert not torch.equal(grafted(x), base)
    torch.testing.assert_close(grafted(x, adapter_ids=torch.full((3,), -1)), base)


def test_package_refuses_another_libtorch(prefix, tmp_path):
    """A LibTorch of another minor version is found: the reason is given, and it is not linked."""
    other = tmp_path / "other" / "share" / "cmake" / "Torch"
    other.mkdir(parents=True)
    (other / "TorchConfig.cmake").write_text("set(Torch_FOUND TRUE)\n")
    (other / "TorchConfigVersion.cmake").write_text(
        'set(PACKAGE_VERSION "2.12.1")\nset(PACKAGE_VERSION_COMPATIBLE TRUE)\n'
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(host LANGUAGES NONE)\nfind_package(torchgraft REQUIRED)\n"
    )
    search = f"{tmp_path / 'other'};{prefix}"
    result = attempt("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={search}")
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"needs LibTorch {minor}, as it was built with {minor}" in message and "; found 2.12.1 in" in message


@pytest.fixture(scope="module")
def another_torch(tmp_path_factory) -> dict[str, str]:
    """The environment of a process whose torch says that it is 2.99.1."""
    library = tmp_path_factory.mktemp("torch") / "torch_2_99_1.so"
    version = "((2ULL << 56) | (99ULL << 48) | (1ULL << 40))"
    source = library.with_suffix(".c")
    source.write_text(f"unsigned long long aoti_torch_abi_version(void) {{ return {version}; }}\n")
    run("gcc", "-shared", "-fPIC", "-o", library, source)
    return os.environ | {"LD_PRELOAD": str(library)}


LOADED = "import sys, torch; torch.ops.load_library(sys.argv[1]); print('loaded')"
HOSTS = {"linked": "linked_only", "by Python": None}


@pytest.mark.parametrize("host", HOSTS)
def test_a_library_that_meets_another_torch_ends_the_process(host, hosts, prefix, another_torch):
    program = [hosts / HOSTS[host]] if HOSTS[host] else [sys.executable, "-c", LOADED, libraries(prefix)[0]]
    done = attempt(*program, env=another_torch)
    assert done.returncode == -signal.SIGABRT and "loaded" not in done.stdout
    built = re.escape(torch.__version__.split("+")[0])
    assert re.search(
        rf"what\(\):  torchgraft: libtorchgraft.so was built for torch {built}, and this process has torch 2.99.1; ",
        done.stderr,
    ), done.stderr


def test_a_cuda_build_of_torch_needs_no_toolkit(prefix, tmp_path):
    """Torch's own package stops where there is no CUDA toolkit. Programs, and no libraries, load CUDA's operators."""
    torch_root = Path(torch.__file__).parent
    fake = tmp_path / "torch"
    for name in ("include", "share/cmake/Caffe2", "share/cmake/Torch/TorchConfigVersion.cmake"):
        (fake / name).parent.mkdir(parents=True, exist_ok=True)
        (fake / name).symlink_to(torch_root / name)
    (fake / "share/cmake/Torch/TorchConfig.cmake").write_text('message(FATAL_ERROR "cannot find the CUDA libraries")\n')
    (fake / "lib").mkdir()
    for library in (torch_root / "lib").glob("*.so*"):
        (fake / "lib" / library.name).symlink_to(library)
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    for name in ("libtorch_cuda.so", "libc10_cuda.so"):
        run("g++", "-shared", "-o", fake / "lib" / name, "-x", "c++", "/dev/null", f"-Wl,-soname,{name}")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(host LANGUAGES CXX)\nset(CMAKE_CXX_STANDARD 20)\n"
        "find_package(torchgraft REQUIRED)\nadd_executable(host empty.cpp)\nadd_library(plugin SHARED empty.cpp)\n"
        "target_link_libraries(host PRIVATE torchgraft::torchgraft)\n"
        "target_link_libraries(plugin PRIVATE torchgraft::torchgraft)\n"
    )
    run("cmake", "-S", tmp_path, "-B", tmp_path / "b", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={fake};{prefix}")
    run("cmake", "--build", tmp_path / "b")
    assert {"libtorchgraft.so", "libtorch_cuda.so", "libc10_cuda.so"} <= set(needed(tmp_path / "b" / "host"))
    assert [name for name in needed(tmp_path / "b" / "libplugin.so") if "cuda" in name] == []
