"""A wheel, installed into a fresh environment outside the checkout, and the archive of the sources."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import torchgraft
from hosts_support import BUILD, ROOT, attempt, made_once, run

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
# The one environment variable that this run sets for the checkout's own libraries.
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHGRAFT", "PYTHON"))}


def wheel_of(source: Path, folder: Path, *settings: str) -> Path:
    for old in folder.glob("*.whl"):
        old.unlink()
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source, *settings)
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(folder: Path, *what: object) -> Path:
    """A fresh environment with a wheel, or with what pip is told; torch, which is large, is this environment's. Returns
    its Python."""
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", folder)
    python = folder / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(packages, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    Path(packages, "torch").symlink_to(Path(torch.__file__).parent)
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", *what)
    return python


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The wheel of what this build folder holds."""

    def make(folder: Path) -> None:
        wheel_of(ROOT, folder, f"-Ccmake.define.TORCHGRAFT_BUILT={BUILD}")

    return next(made_once("wheel", make).glob("*.whl"))


@pytest.fixture(scope="session")
def python(wheel) -> Path:
    return made_once("environment", lambda folder: installed(folder, wheel)) / "bin" / "python"


def outside(python: Path, program: str, folder: Path) -> subprocess.CompletedProcess:
    return attempt(python, "-c", program, cwd=folder, env=OUTSIDE)


GRAFTS = """
import torch, torchgraft
layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
base = torch.jit.script(torch.nn.TransformerEncoder(layer, 2).eval())
torchgraft.graft(base, config="unipelt", name="task").save("grafted.pt")
model = torch.jit.load("grafted.pt")
x = torch.randn(3, 5, 16)
with torch.no_grad():
    torch.testing.assert_close(model(x, adapter_ids=torch.full((3,), -1)), base(x))
    assert not torch.equal(model(x), base(x))
print(torchgraft.__file__, torchgraft.library_path(), torchgraft.cmake_prefix_path, sep="\\n")
"""


@pytest.mark.quick
def test_the_wheel_grafts_outside_the_checkout(python, tmp_path):
    done = outside(python, GRAFTS, tmp_path)
    assert done.returncode == 0, done.stderr
    environment = str(python.parents[1])
    for path in done.stdout.split():
        assert path.startswith(environment)


@pytest.mark.quick
def test_the_wheel_has_the_command(python, tmp_path):
    command = python.with_name("torchgraft")
    done = attempt(command, "--version", cwd=tmp_path, env=OUTSIDE)
    assert done.returncode == 0 and done.stdout.startswith(f"torchgraft {torchgraft.__version__}, torch "), done.stderr
    outside(python, GRAFTS, tmp_path)
    for start in ([command], [python, "-m", "torchgraft"]):
        done = attempt(*start, "list", tmp_path / "grafted.pt", cwd=tmp_path, env=OUTSIDE)
        assert done.returncode == 0 and "task" in done.stdout, done.stderr
    done = attempt(command, "list", tmp_path / "none.pt", cwd=tmp_path, env=OUTSIDE)
    assert done.returncode == 1 and done.stderr == f"torchgraft: error: {tmp_path / 'none.pt'}: no such file\n"


def test_a_file_is_grafted_without_a_compiler(python, tmp_path):
    """The only programs on the path are the environment's own."""
    alone = OUTSIDE | {"PATH": str(python.parent)}
    assert not any(shutil.which(name, path=alone["PATH"]) for name in ("g++", "gcc", "cc", "c++", "cmake", "ninja"))
    outside(python, GRAFTS.replace("grafted.pt", "base.pt"), tmp_path)
    command = [python.with_name("torchgraft"), "add", "base.pt", "-o", "out.pt", "--config", "lora", "--name", "other"]
    done = attempt(*command, cwd=tmp_path, env=alone)
    assert done.returncode == 0 and (tmp_path / "out.pt").exists(), done.stderr


def test_an_editable_installation_follows_the_checkout(tmp_path):
    built = f"-Ccmake.define.TORCHGRAFT_BUILT={BUILD}"
    python = installed(tmp_path / "environment", "--no-build-isolation", built, "-e", ROOT)
    done = outside(python, GRAFTS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(ROOT / "python" / "torchgraft" / "__init__.py")


def test_the_wheel_holds_what_hosts_need_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    binding = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    libraries = {f"torchgraft/lib/{name}" for name in (binding, "libtorchgraft.so", "libtorchgraft_patch.so")}
    assert {name for name in names if name.endswith(".so")} == libraries
    for name in ("lib/cmake/torchgraft/torchgraftConfig.cmake", "include/torchgraft/patch/graft.h", "grafting.py"):
        assert f"torchgraft/{name}" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"torchgraft", "torchgraft_command", f"torchgraft-{torchgraft.__version__}.dist-info"}
    assert [name for name in names if "test" in name or name.startswith("torchgraft/examples")] == []


def test_nothing_of_the_building_machine_is_in_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    for library in tmp_path.rglob("*.so"):
        (path,) = re.findall(r"\(RUNPATH\)\s+Library runpath: \[(.*)\]", run("readelf", "-d", library).stdout)
        assert path == "$ORIGIN:$ORIGIN/../../torch/lib"
    places = [str(place).encode() for place in (ROOT, Path(torch.__file__).parent)]
    for file in tmp_path.rglob("*"):
        if file.suffix in (".cmake", ".txt", ".py", ".h"):
            assert [place for place in places if place in file.read_bytes()] == [], file


def test_the_libraries_need_libtorch_and_the_system_only(wheel, tmp_path):
    """Of the system: the C and C++ runtimes, and OpenMP's, which torch's wheel has beside LibTorch."""
    system = {"ld-linux-x86-64.so.2", "libc.so.6", "libgcc_s.so.1", "libgomp.so.1", "libm.so.6", "libstdc++.so.6"}
    libtorch = {"libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so"}
    zipfile.ZipFile(wheel).extractall(tmp_path)
    found = {library.name: library for library in tmp_path.rglob("*.so")}
    for library in found.values():
        needed = set(re.findall(r"\(NEEDED\)\s+Shared library: \[(.*)\]", run("readelf", "-d", library).stdout))
        assert needed - system - libtorch - set(found) == set(), library
    assert (Path(torch.__file__).parent / "lib" / "libgomp.so.1").exists()


def test_the_wheel_asks_for_the_torch_that_it_was_built_with(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    minor = ".".join(torch.__version__.split(".")[:2])
    assert [line for line in metadata.get_all("Requires-Dist") if line.startswith("torch")] == [f"torch=={minor}.*"]
    assert metadata["Version"] == torchgraft.__version__


def test_another_torch_is_named_at_import(wheel, tmp_path):
    python = installed(tmp_path / "environment", wheel)
    (version,) = (tmp_path / "environment").rglob("torchgraft_torch_version.txt")
    assert version.read_text().strip() == torch.__version__.partition("+")[0]
    version.write_text("2.99.0\n")
    done = outside(python, "import torchgraft", tmp_path)
    assert f"were built for torch 2.99.0, and torch {torch.__version__} is installed" in done.stderr
    assert "pip install --no-build-isolation" in done.stderr


def prefix_of(python: Path, folder: Path) -> str:
    return outside(python, "import torchgraft; print(torchgraft.cmake_prefix_path)", folder).stdout.strip()


def test_a_host_builds_against_the_wheel_by_pkg_config(python, tmp_path):
    """And finds torch in the wheel's environment."""
    found = OUTSIDE | {"PKG_CONFIG_PATH": str(Path(prefix_of(python, tmp_path), "lib", "pkgconfig"))}
    flags = run("pkg-config", "--cflags", "--libs", "torchgraft", env=found).stdout.split()
    run("g++", "-std=c++20", ROOT / "tests" / "consumer" / "anchored.cpp", *flags, "-o", tmp_path / "anchored")
    assert run(tmp_path / "anchored", env=OUTSIDE).stdout.strip() == torchgraft.__version__
    assert run("pkg-config", "--modversion", "torchgraft", env=found).stdout.strip() == torchgraft.__version__


@pytest.mark.slow(seconds=300)
@pytest.mark.parametrize("example", ["serve", "serve_aoti", "generate", "train_cpp", "server"])
def test_an_example_builds_against_the_wheel_alone(example, python, tmp_path):
    """CMAKE_PREFIX_PATH names the wheel; torch is found beside it, in its environment."""
    if example == "server" and not Path("/usr/include/microhttpd.h").exists():
        pytest.skip("microhttpd.h was not found: install libmicrohttpd-dev")
    build = tmp_path / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={prefix_of(python, tmp_path)}"
    run("cmake", "-S", ROOT / "examples" / example, "-B", build, "-G", "Ninja", prefix, env=OUTSIDE)
    run("cmake", "--build", build, "-j", os.environ.get("TORCHGRAFT_JOBS", "2"), env=OUTSIDE)
    done = attempt(build / example, "--help", env=OUTSIDE)
    assert done.returncode == 0 and re.search("MODEL.pt|PACKAGE.pt2", done.stdout), done.stderr


def test_without_torch_a_build_says_what_to_do(tmp_path):
    """An environment without torch, as python -m build makes one: its interpreter has none to build against."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment")
    done = attempt(tmp_path / "environment" / "bin" / "python", ROOT / "cmake" / "find_torch.py", env=OUTSIDE)
    assert done.returncode == 1
    assert "none was found: install torch" in done.stderr and "--no-build-isolation" in done.stderr


@pytest.fixture(scope="session")
def sources() -> Path:
    def make(folder: Path) -> None:
        for old in folder.glob("*.tar.gz"):
            old.unlink()
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT)

    return next(made_once("sources", make).glob("*.tar.gz"))


def test_the_archive_of_the_sources_is_what_a_build_needs(sources):
    with tarfile.open(sources) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "-C", ROOT, "ls-files").stdout.split()
    folders = ("activations/", "cmake/", "config/", "ops/", "patch/", "plan/", "python/", "registration/")
    assert [name for name in tracked if name.startswith(folders) and name not in inside] == []
    assert [name for name in inside if name.split("/")[0] in ("tests", "build", "examples", ".venv")] == []
    assert {"CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", "PKG-INFO"} <= inside


@pytest.mark.slow(seconds=900)
def test_the_archive_of_the_sources_builds(sources, tmp_path):
    (tmp_path / "wheel").mkdir()
    python = installed(tmp_path / "environment", wheel_of(sources, tmp_path / "wheel"))
    done = outside(python, GRAFTS, tmp_path)
    assert done.returncode == 0, done.stderr
