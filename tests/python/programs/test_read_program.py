"""Exported programs in files: as BASE of every command, and what is refused, in one line."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import torchgraft
from oracle import difference
from scripts_here import run_here
from small import HIDDEN, Encoder
from torchgraft._kinds import Kind, kind_of
from torchgraft.programs.read_program import is_size_text, quiet


def exported(open_sizes: bool = True) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},) if open_sizes else None
    with quiet():
        return torch.export.export(Encoder().eval(), (torch.randn(2, 5, HIDDEN),), dynamic_shapes=shapes)


def changed(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Writes a copy of an archive in which each member is what `change` makes of it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


class Command:
    """What unpickling would run."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("unpickled"),)


def _example(name: str, content: bytes) -> bytes:
    if not name.endswith("sample_inputs/model.pt"):
        return content
    buffer = io.BytesIO()
    torch.save((Command(),), buffer)
    return buffer.getvalue()


def _pickled_weight(name: str, content: bytes) -> bytes:
    if not name.endswith("model_weights_config.json"):
        return content
    config = json.loads(content)
    next(iter(config["config"].values()))["use_pickle"] = True
    return json.dumps(config).encode()


def _size(name: str, content: bytes) -> bytes:
    return content.replace(b"Symbol('", b"print('") if name.endswith("model.json") else content


def _version(name: str, content: bytes) -> bytes:
    return content.replace(b'"major": 8', b'"major": 7') if name.endswith("model.json") else content


def _names(name: str, content: bytes) -> bytes:
    return content.replace(b'"q.weight"', b'"r.weight"') if name.endswith("model.json") else content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    with quiet():
        torch.export.save(exported(), folder / "base.pt2", extra_files={"note": "kept"})
        torch.export.save(exported(open_sizes=False), folder / "fixed.pt2")
        torch.export.save(exported().run_decompositions(), folder / "core.pt2")
        grafted = torchgraft.graft(torchgraft.from_program(exported()), "lora", "task")
        torch.export.save(torchgraft.export(grafted, torch.randn(2, 5, HIDDEN)), folder / "grafted.pt2")
    for change in (_example, _pickled_weight, _size, _version, _names):
        changed(folder / "base.pt2", folder / f"{change.__name__}.pt2", change)
    whole = (folder / "base.pt2").read_bytes()
    middle = whole.index(b"model.json") + 2000
    (folder / "damaged.pt2").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    (folder / "short.pt2").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(folder / "package.pt2", "w") as archive:
        archive.writestr("p/archive_format", "pt2")
        archive.writestr("p/data/aotinductor/model/a.wrapper.so", b"")
    with zipfile.ZipFile(folder / "old.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    save_file({"weight": torch.zeros(2)}, folder / "weights.safetensors")
    torch.save({"weight": torch.zeros(2)}, folder / "state.pt")
    (folder / "legacy.pt").write_bytes(pickle.dumps({"weight": 1}))
    return folder


REFUSED = {
    "core.pt2": "the program is one of core ATen (it calls aten.",
    "grafted.pt2": "the program is grafted already; change the TorchScript file that it was exported from",
    "package.pt2": "an AOTInductor package, which is compiled code and no model to change",
    "old.pt2": "it is an exported program of an older torch",
    "damaged.pt2": "a damaged exported program (",
    "short.pt2": "not a TorchScript file that can be loaded",
    "_example.pt2": "its example inputs are pickled objects, which are not read",
    "_pickled_weight.pt2": "'q.weight' is a pickled object, which is not read",
    "_size.pt2": "a size is written as",
    "_version.pt2": "an exported program of torch 2.",
    "_names.pt2": "a damaged exported program (",
    "weights.safetensors": "it is tensors alone, of safetensors",
    "state.pt": "it is what torch.save() wrote",
    "legacy.pt": "it is what torch.save() wrote",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_base_is_named_in_one_line(name: str, folder: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("graft.py", "inspect", folder / name)
    assert done.returncode == 1
    assert done.stderr.startswith(f"graft: error: {folder / name}: ") and done.stderr.count("\n") == 1
    assert REFUSED[name] in done.stderr
    assert capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


@pytest.mark.quick
def test_a_program_is_a_base_of_every_command(folder: Path, tmp_path: Path) -> None:
    base = folder / "base.pt2"
    done = run_here("graft.py", "inspect", base, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert [layer["query"]["path"] for layer in json.loads(done.stdout)["layers"]] == ["q"]
    done = run_here("graft.py", "add", base, "-o", tmp_path / "out.pt", "--config", "unipelt", "--name", "task")
    assert (done.returncode, done.stderr) == (0, "")
    found = {"note": ""}
    module = torch.jit.load(str(tmp_path / "out.pt"), _extra_files=found)
    assert found == {"note": b"kept"}
    x = torch.randn(3, 7, HIDDEN)
    with torch.no_grad():
        expected = exported().module()(x)
        assert difference(module(x, torch.tensor([-1, -1, -1])), expected) <= 1e-6
    assert run_here("graft.py", "save", tmp_path / "out.pt", "task", tmp_path / "task").returncode == 0
    assert "selfattn_lora_q" in run_here("graft.py", "match", base, tmp_path / "task").stdout
    pool = torchgraft.AdapterPool(torchgraft.from_program(exported()), capacity=2)
    pool.insert("task", tmp_path / "task")
    with pool.acquire(["task", "", "task"]) as lease, torch.no_grad():
        assert difference(lease.module(x, adapter_ids=lease.ids), module(x, torch.tensor([0, -1, 0]))) <= 1e-6


def test_a_program_of_one_size_says_so(folder: Path, tmp_path: Path) -> None:
    done = run_here(
        "graft.py", "add", folder / "fixed.pt2", "-o", tmp_path / "out.pt", "--config", "lora", "--name", "t"
    )
    assert done.returncode == 0
    assert f"warning: {folder / 'fixed.pt2'}: the program takes inputs of one size only (x [2, 5, 16])" in done.stderr
    module = torch.jit.load(str(tmp_path / "out.pt"))
    assert module(torch.randn(2, 5, HIDDEN)).shape == (2, 5, HIDDEN)
    with pytest.raises(torch.jit.Error, match=r"the exported program takes x of size \[2, 5, 16\] only"):
        module(torch.randn(2, 6, HIDDEN))


def test_what_a_program_shares_and_returns() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()
            self.tied = self.encoder.q
            self.offsets = torch.tensor([1.0, 2.0])  # a constant, in no state dict

        def forward(self, x: Tensor, names: list[Tensor], flag: bool, *, scale: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                shift = self.offsets.sum()
            hidden = self.encoder(x) * scale + names[0] + shift
            return {"hidden": hidden, "tied": self.tied(x) if flag else x}

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 5, HIDDEN)
    with quiet():
        program = torch.export.export(model, (x, [x], True), {"scale": torch.tensor(2.0)})
    script = torchgraft.from_program(program)
    assert [a.name for a in script.forward.schema.arguments[1:]] == ["x", "names_0", "scale"]
    expected = model(x, [x], True, scale=torch.tensor(3.0))
    result = script(x, x, scale=torch.tensor(3.0))
    assert sorted(result) == ["hidden", "tied"]
    assert all(difference(result[key], expected[key]) <= 1e-6 for key in expected)
    assert dict(script.named_parameters())["encoder.k.weight"].data_ptr() == model.encoder.k.weight.data_ptr()
    assert script.tied.weight.data_ptr() == script.encoder.q.weight.data_ptr()


def test_only_programs_are_taken() -> None:
    with pytest.raises(TypeError, match="expected a torch.export.ExportedProgram, got Encoder"):
        torchgraft.from_program(Encoder())
    with pytest.raises(TypeError, match=r"got ExportedProgram; .*from_program\(\) makes one of an exported program"):
        torchgraft.lower(exported())  # of a grafted module, which no program is


def _pooled(program: torch.export.ExportedProgram, directory: Path) -> torch.jit.ScriptModule:
    pool = torchgraft.AdapterPool(program, capacity=1)
    pool.insert("task", directory)
    with pool.acquire(["task"]) as lease:
        return lease.module


BASES: dict[str, Callable] = {
    "graft": lambda program, directory: torchgraft.graft(program, adapters={"task": directory}),
    "load_adapter": torchgraft.load_adapter,
    "AdapterPool": _pooled,
    "optimize": lambda program, directory: torchgraft.optimize(program),
    "quantize": lambda program, directory: torchgraft.quantize(program),
    "inspect": lambda program, directory: torchgraft.inspect(program),
    "match_adapter": torchgraft.match_adapter,
    "linear_maps": lambda program, directory: torchgraft.linear_maps(program),
}


@pytest.mark.parametrize("function", BASES)
def test_a_program_is_a_base_like_its_torchscript(function: str, tmp_path: Path) -> None:
    program, x = exported(), torch.randn(3, 7, HIDDEN)
    script = torchgraft.from_program(program)
    grafted = torchgraft.graft(script, "lora[init_weights='bert']", "task")
    torchgraft.save_adapter(grafted, "task", tmp_path / "task")
    made, expected = (BASES[function](each, tmp_path / "task") for each in (program, script))
    if isinstance(expected, torch.jit.ScriptModule):
        ids = {"adapter_ids": torch.zeros(3, dtype=torch.long)} if function == "AdapterPool" else {}
        made, expected = made(x, **ids), expected(x, **ids)
        assert difference(made, expected) == 0.0
    else:
        assert made == expected and made


@pytest.mark.parametrize("text", ["Symbol('s0', integer=True)", "Mul(Integer(2), Symbol('s77'))", "s0//2 + 1"])
def test_sizes_are_read(text: str) -> None:
    assert is_size_text(text)


_RUN = "__import__('os').system('true')"


@pytest.mark.parametrize(
    "text",
    [_RUN, "exec('1')", f"Symbol({_RUN})", "Symbol('exec')", "Symbol('s0', real=exec)", "s0.__class__", "[s0]",
     "lambda: 1", "9**9**9", "Pow(Integer(9), Integer(99))", "Add(*s0)", "s0 +", 1, "'s0'"],
)  # fmt: skip
def test_texts_that_are_no_sizes_are_not_run(text: object) -> None:
    assert not is_size_text(text)


def test_kinds(folder: Path, tmp_path: Path) -> None:
    torch.jit.trace(Encoder(), torch.randn(2, 5, HIDDEN)).save(str(tmp_path / "script.pt"))
    assert kind_of(tmp_path / "script.pt") is Kind.SCRIPT
    assert kind_of(folder / "base.pt2") is Kind.PROGRAM
    (tmp_path / "text").write_text("text")
    assert kind_of(tmp_path / "text") is Kind.UNKNOWN
