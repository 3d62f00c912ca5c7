"""The Python package: finding its libraries, its arguments and errors, adapter directories."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import adapters
import torchgraft
from grafted import base, saved_adapter
from models import VARIANTS, make_batch
from oracle import make_oracle_adapter, oracle_for
from torchgraft._libraries import patcher

ROOT = Path(__file__).resolve().parents[2]
FLOAT = torch.float32
VARIANT = VARIANTS["bert_sdpa"]


@pytest.fixture
def module() -> torch.jit.ScriptModule:
    """A traced BERT. Do not change it."""
    return base("bert_sdpa", FLOAT)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A LoRA adapter, as the oracle saves it, to be damaged at will."""
    return Path(shutil.copytree(saved_adapter(VARIANT, FLOAT, "lora").directory, tmp_path / "adapter"))


# --- Libraries


def in_another_process(program: str, **environment: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHONPATH": str(ROOT / "python")} | environment
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=variables)


def test_the_library_is_that_of_the_folder_asked_for(tmp_path: Path) -> None:
    library = torchgraft.library_path()
    assert library.name == "libtorchgraft.so" and library.is_file()
    for path in library.parent.glob("*.so*"):
        (tmp_path / path.name).symlink_to(path.resolve())
    done = in_another_process(
        "import torch, torchgraft; print(torchgraft.library_path(), hasattr(torch.ops.torchgraft, 'gated_lora'))",
        TORCHGRAFT_LIBRARY_DIR=str(tmp_path),
    )
    assert done.stdout.split() == [str(tmp_path / "libtorchgraft.so"), "True"], done.stderr


def test_a_folder_without_libraries_is_named(tmp_path: Path) -> None:
    done = in_another_process("import torchgraft", TORCHGRAFT_LIBRARY_DIR=str(tmp_path))
    assert done.returncode != 0
    assert f"ImportError: torchgraft: libtorchgraft.so was not found in {tmp_path}; run scripts/setup" in done.stderr


def test_a_library_that_does_not_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "libtorchgraft.so").write_text("not a library")
    done = in_another_process("import torchgraft", TORCHGRAFT_LIBRARY_DIR=str(tmp_path))
    assert f"ImportError: torchgraft: {tmp_path / 'libtorchgraft.so'} does not load with torch" in done.stderr


def test_a_library_for_another_torch_is_named_with_both_versions(tmp_path: Path) -> None:
    library = torchgraft.library_path()
    (tmp_path / library.name).symlink_to(library.resolve())
    (tmp_path / "torchgraft_torch_version.txt").write_text("2.9.1+cpu\n")
    done = in_another_process("import torchgraft", TORCHGRAFT_LIBRARY_DIR=str(tmp_path))
    assert f"the libraries in {tmp_path} were built for torch 2.9.1+cpu, and torch {torch.__version__}" in done.stderr
    assert "ImportError" in done.stderr and "install torch==2.9.*" in done.stderr
    # Of one minor version, any build.
    minor = ".".join(torch.__version__.split(".")[:2])
    (tmp_path / "torchgraft_torch_version.txt").write_text(f"{minor}.99+cu999\n")
    assert in_another_process("import torchgraft", TORCHGRAFT_LIBRARY_DIR=str(tmp_path)).returncode == 0


def test_a_library_alone_for_another_torch_is_named(tmp_path: Path) -> None:
    """Without torchgraft_torch_version.txt; loading it would end the process."""
    torch_version = torch.__version__.split("+")[0].encode()
    library, other = torchgraft.library_path(), b"9" * len(torch_version)
    built = b"was built for torch " + torch_version
    content = library.read_bytes()
    assert content.count(built) == 1
    (tmp_path / library.name).write_bytes(content.replace(built, b"was built for torch " + other))
    done = in_another_process("import torchgraft", TORCHGRAFT_LIBRARY_DIR=str(tmp_path))
    assert f"were built for torch {other.decode()}, and torch {torch.__version__} is installed" in done.stderr
    assert done.returncode == 1 and "ImportError" in done.stderr


def test_operators_alone_suffice_until_something_is_grafted(tmp_path: Path) -> None:
    library = torchgraft.library_path()
    (tmp_path / library.name).symlink_to(library.resolve())
    done = in_another_process(
        "import torch, torchgraft\n"
        "torchgraft.UniPELTConfig()\n"
        "print(torch.ops.torchgraft.gated_lora)\n"
        "torchgraft.inspect(torch.jit.script(torch.nn.Linear(2, 2)))\n",
        TORCHGRAFT_LIBRARY_DIR=str(tmp_path),
    )
    assert "torchgraft.gated_lora" in done.stdout
    version = f"3.{sys.version_info.minor}"
    assert f"ImportError: torchgraft: no _C module for Python {version} was found in {tmp_path}" in done.stderr


@pytest.mark.quick
def test_versions_agree() -> None:
    assert patcher().version() == torchgraft.__version__
    assert f"project(torchgraft VERSION {torchgraft.__version__} " in (ROOT / "CMakeLists.txt").read_text()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == torchgraft.__version__


def test_everything_that_is_announced_is_there() -> None:
    assert sorted(torchgraft.__all__) == torchgraft.__all__
    for name in torchgraft.__all__:
        assert getattr(torchgraft, name).__doc__, name


# --- graft() and inspect()


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_kept(training: bool) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    source = torch.jit.script(torch.nn.TransformerEncoder(layer, 1)).train(training)
    grafted = torchgraft.graft(source, config="lora", name="task")
    modes = {submodule.training for submodule in grafted.modules()}
    assert modes == {training} and grafted.training is training and source.training is training


@pytest.mark.parametrize(
    "config",
    [
        "mam",
        torchgraft.MAMConfig(),
        adapters.MAMConfig(),
        torchgraft.MAMConfig().to_dict(),
        {"config": torchgraft.MAMConfig().to_dict(), "name": "whatever"},
    ],
    ids=["name", "ours", "the oracle's", "dict", "content of adapter_config.json"],
)
def test_a_configuration_can_be_given_in_many_ways(module, config) -> None:
    grafted = torchgraft.graft(module, config=config, name="task")
    assert json.loads(grafted.adapter_config("task")) == torchgraft.MAMConfig().to_dict()


def test_a_configuration_can_be_a_file(module, directory: Path) -> None:
    expected = json.loads((directory / "adapter_config.json").read_text())["config"]
    for config in (directory, str(directory), directory / "adapter_config.json"):
        grafted = torchgraft.graft(module, config=config, name="task")
        got = json.loads(grafted.adapter_config("task"))
        assert {field: got[field] for field in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no adapter was given"),
        ({"config": "lora"}, r"needs the name of its adapter \(name=\.\.\.\)"),
        ({"name": "task"}, "'task' needs a config"),
        ({"config": "unipel", "name": "task"}, "no configuration is called 'unipel'; there are: .*unipelt"),
        ({"config": {"architecture": "lora", "rank": 3}, "name": "task"}, "rank"),
        ({"config": "lora", "name": "task", "active": "other"}, "^activate: no adapter is called 'other'; .*: task$"),
        ({"config": "lora", "name": "task", "gate_pooling": "none"}, 'expected gate_pooling "all" or "unpadded"'),
        ({"config": "lora", "name": "task", "token_mask": "mask"}, "token mask"),
    ],
)
@pytest.mark.quick
def test_wrong_arguments_are_named_without_a_trace(module, arguments: dict, message: str) -> None:
    with pytest.raises(torchgraft.GraftError, match=message) as caught:
        torchgraft.graft(module, **arguments)
    assert isinstance(caught.value, ValueError)
    for noise in ("Exception raised from", "Traceback", "frame #"):
        assert noise not in str(caught.value)


def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), torch.jit.script(twice), "base.pt", None])
def test_only_torchscript_modules_are_taken(thing) -> None:
    for call in (torchgraft.inspect, lambda given: torchgraft.graft(given, config="lora", name="task")):
        with pytest.raises(TypeError, match=r"torchgraft works on TorchScript modules, got .*torch\.jit\.trace"):
            call(thing)


def test_inspect_is_plain_data_and_the_same_after_grafting(module) -> None:
    structure = torchgraft.inspect(module)
    assert json.loads(json.dumps(structure)) == structure
    assert [layer["num_heads"] for layer in structure["layers"]] == [4, 4, 4]
    assert torchgraft.inspect(torchgraft.graft(module, config="unipelt", name="task")) == structure


# --- Adapter directories


def test_a_directory_is_read() -> None:
    saved = saved_adapter(VARIANT, FLOAT, "unipelt")
    read = torchgraft.load_adapter_directory(saved.directory)
    assert read.name == saved.name
    assert json.loads(read.config)["config"] == json.loads(json.dumps(adapters.UniPELTConfig().to_dict()))
    expected = torch.load(Path(saved.directory) / "pytorch_adapter.bin", weights_only=True)
    assert read.weights.keys() == expected.keys()
    assert all(torch.equal(read.weights[key], value) for key, value in expected.items())


def test_safetensors_are_read(module, tmp_path: Path) -> None:
    model = oracle_for(VARIANT, FLOAT).model
    make_oracle_adapter(model, adapters.LoRAConfig(r=3, alpha=6), "in_safetensors", 5)
    for kind, safe in (("pickled", False), ("safe", True)):
        model.save_adapter(str(tmp_path / kind), "in_safetensors", use_safetensors=safe)
    assert not (tmp_path / "safe" / "pytorch_adapter.bin").exists()
    arguments = VARIANT.arguments(make_batch([5, 3], 5, FLOAT))
    with torch.no_grad():
        pickled, safe = (
            torchgraft.graft(module, adapters={"task": tmp_path / kind})(*arguments)[0] for kind in ("pickled", "safe")
        )
        assert torch.equal(pickled, safe)
        assert not torch.allclose(pickled, module(*arguments)[0], atol=1e-3)


class Harmful:
    """Pickles as a call that makes a file."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return self.witness.touch, ()


def _no_config(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()


def _a_fusion(directory: Path) -> None:
    (directory / "adapter_config.json").rename(directory / "adapter_fusion_config.json")


def _a_setup(directory: Path) -> None:
    (directory / "adapter_config.json").rename(directory / "adapter_setup.json")


def _bad_json(directory: Path) -> None:
    (directory / "adapter_config.json").write_text('{"config": ')


def _binary_json(directory: Path) -> None:
    (directory / "adapter_config.json").write_bytes(b"\xff\xfe\x00")


def _no_name(directory: Path) -> None:
    (directory / "adapter_config.json").write_text('{"config": {}}')


def _a_list(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("[]")


def _no_weights(directory: Path) -> None:
    (directory / "pytorch_adapter.bin").unlink()


def _cut_weights(directory: Path) -> None:
    path = directory / "pytorch_adapter.bin"
    path.write_bytes(path.read_bytes()[:500])


def _cut_safetensors(directory: Path) -> None:
    (directory / "adapter.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")


def _a_tensor(directory: Path) -> None:
    torch.save(torch.zeros(2), directory / "pytorch_adapter.bin")


def _code(directory: Path) -> None:
    torch.save({"weight": Harmful(directory / "witness")}, directory / "pytorch_adapter.bin")


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (shutil.rmtree, "", "not a directory"),
        (_no_config, "adapter_config.json", r"cannot read the adapter's configuration \(No such file"),
        (_a_fusion, "", "it holds AdapterFusion layers .*, not an adapter; load_adapter_fusion"),
        (_a_setup, "", "it holds a composition .*, not an adapter; load_adapter_setup"),
        (_bad_json, "adapter_config.json", "not JSON"),
        (_binary_json, "adapter_config.json", "not JSON"),
        (_no_name, "adapter_config.json", 'no "name"; is it an AdapterHub adapter'),
        (_a_list, "adapter_config.json", 'no "name"'),
        (_no_weights, "", "no weights, looked for .*pytorch_adapter.bin"),
        (_cut_weights, "pytorch_adapter.bin", "cannot read the adapter's weights"),
        (_cut_safetensors, "adapter.safetensors", "cannot read the adapter's weights"),
        (_a_tensor, "pytorch_adapter.bin", "expected a state dict of tensors, got Tensor"),
        (_code, "pytorch_adapter.bin", "refused, it holds more than plain tensors"),
    ],
)
@pytest.mark.quick
def test_a_damaged_directory_is_named(directory: Path, damage, file: str, message: str) -> None:
    damage(directory)
    with pytest.raises(torchgraft.GraftError, match=message) as caught:
        torchgraft.load_adapter_directory(directory)
    assert str(caught.value).startswith(str(directory / file))
    assert "\n" not in str(caught.value)
    assert not (directory / "witness").exists()
