"""The README's snippets run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def _snippet(language: str) -> str:
    blocks = re.findall(rf"<!-- test -->\n```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def _run_python(folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    subprocess.run([sys.executable, "-c", _snippet("python")], check=True, cwd=folder, env=environment, timeout=300)


def test_python_snippet(tmp_path) -> None:
    _run_python(tmp_path)
    assert (tmp_path / "grafted.pt").stat().st_size > 0


def test_cpp_snippet_compiles_and_runs_as_an_outside_consumer(tmp_path) -> None:
    _run_python(tmp_path)
    (tmp_path / "main.cpp").write_text(_snippet("cpp"))
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(snippet CXX)\nset(CMAKE_CXX_STANDARD 20)\n"
        "find_package(torchgraft REQUIRED)\nadd_executable(snippet main.cpp)\n"
        "target_link_libraries(snippet PRIVATE torchgraft::torchgraft)\n"
    )
    build = Path(os.environ.get("TORCHGRAFT_BUILD_DIR", ROOT / "build"))
    search = f"{tmp_path / 'prefix'};{torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "--install", str(build), "--prefix", str(tmp_path / "prefix")],
        ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "b"), "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={search}"],
        ["cmake", "--build", str(tmp_path / "b")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [str(tmp_path / "b" / "snippet"), str(tmp_path / "grafted.pt")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[3, 10, 64]"
