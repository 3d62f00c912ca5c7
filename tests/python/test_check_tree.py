"""What scripts/check_tree.py says of who includes whom, on trees of one file."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_tree.py"


@pytest.fixture
def check_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, for a tree in `tmp_path`."""
    spec = importlib.util.spec_from_file_location("check_tree", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return Path(name)


@pytest.mark.parametrize(
    ("name", "include", "allowed"),
    [
        ("patch/graph/a.cpp", "<torchgraft/patch/graph/graph_utils.h>", True),
        ("patch/graph/a.cpp", "<torchgraft/registration/export.h>", True),
        ("patch/graph/a.cpp", "<vector>", True),
        ("patch/graph/a.cpp", "<ATen/ATen.h>", True),
        ("patch/graph/a.cpp", "<pybind11/pybind11.h>", False),
        ("patch/graph/a.cpp", "<torchgraft/patch/sites/find_sites.h>", False),
        ("patch/insert/a.cpp", "<torchgraft/patch/module/draft.h>", False),
        ("patch/module/a.cpp", "<torchgraft/patch/insert/insert.h>", True),
        ("patch/module/a.cpp", "<torchgraft/patch/graft_spec.h>", True),
        ("patch/module/a.cpp", "<torchgraft/patch/graft.h>", False),
        ("patch/a.cpp", "<torchgraft/ops/kernel_mode.h>", False),
        ("python/a.cpp", "<torchgraft/ops/kernel_mode.h>", True),
        ("python/a.cpp", "<torchgraft/ops/bank.h>", False),
        ("ops/forward/a.cpp", "<torchgraft/ops/autograd/recording.h>", False),
        ("python/a.cpp", '"binding.h"', True),
        ("plan/a.cpp", '"../patch/graft.h"', False),
        ("plan/a.cpp", '"torch/csrc/jit/ir/ir.h"', False),
    ],
)
def test_includes(check_tree: ModuleType, tmp_path: Path, name: str, include: str, allowed: bool) -> None:
    write(tmp_path, "python/binding.h", "")
    write(tmp_path, "patch/graft.h", "")
    path = write(tmp_path, name, f"// first\n#include {include}\n")
    assert [number for _, number, _ in check_tree.forbidden_includes(path)] == ([] if allowed else [2])


def test_new_folder_has_to_be_entered(check_tree: ModuleType, tmp_path: Path) -> None:
    [finding] = check_tree.forbidden_includes(write(tmp_path, "patch/new/a.cpp", ""))
    assert finding[2] == "patch/new/ stands in no layer: enter it in LAYERS in scripts/check_tree.py"


def test_folders_of_the_patcher_build_on_each_other_in_one_order(check_tree: ModuleType) -> None:
    order = [folder for folder in check_tree.LAYERS if folder.split("/")[0] == "patch"]
    assert order[-1] == "patch"
    for i, folder in enumerate(order):
        known, _ = check_tree.LAYERS[folder]
        assert not set(known.split()) & set(order[i:]), folder


def test_tables_say_what_the_layers_say(check_tree: ModuleType, tmp_path: Path) -> None:
    names = ["registration", "activations", "config", "plan", "ops", "patch", "python"]
    wanted = check_tree.layers_of("CONTRIBUTING.md")
    assert list(wanted) == names
    rows = {name: "".join(f"`{known}`, " for known in sorted(wanted[name])) for name in names}
    table = "".join(f"| `{name}/` | what it is | {known}ATen |\n" for name, known in rows.items())
    path = write(tmp_path, "CONTRIBUTING.md", table)
    assert list(check_tree.wrong_layers(path)) == []

    row = "| `registration/` | what it is | "
    path = write(tmp_path, "CONTRIBUTING.md", table.replace(row, row + "`ops/`, "))
    [finding] = check_tree.wrong_layers(path)
    assert finding[1] == 1 and "registration/ knows nothing" in finding[2]

    path = write(tmp_path, "CONTRIBUTING.md", table.replace("| `plan/`", "| plan"))
    [finding] = check_tree.wrong_layers(path)
    assert finding[2] == "no table has a row for plan/, a layer in scripts/check_tree.py"


def test_the_table_of_what_is_installed_says_what_cmake_installs(check_tree: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "cmake/install.cmake", "  list(APPEND headers\n    patch/graft.h\n    patch/life.h)\n")
    row = "| `patch/` | what is installed: `graft`, `life` | `config/` |\n"
    assert list(check_tree.wrong_installed(write(tmp_path, "a.md", "text\n" + row))) == []
    for old, new, name in (("`graft`, ", "", "graft"), ("`life`", "`life`, `other`", "other")):
        [finding] = check_tree.wrong_installed(write(tmp_path, "a.md", row.replace(old, new)))
        assert finding[1] == 1 and finding[2].startswith(f"`{name}` is installed by")
    write(tmp_path, "patch/graft.cpp", "")
    assert list(check_tree.wrong_installed(write(tmp_path, "a.md", row))) == []
    write(tmp_path, "patch/helper.h", "")
    [finding] = check_tree.wrong_installed(write(tmp_path, "a.md", row))
    assert finding[0] == Path("patch/helper.h") and finding[2].startswith("not installed: move it")
