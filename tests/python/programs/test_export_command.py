"""graft.py export and torchgraft.export: what they write, gradients, and what they refuse."""

import importlib.util
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from grafted import base, grafted
from models import VARIANTS
from oracle import difference, varied_batches
from scripts_here import run_here
from torchgraft.programs.read_program import quiet

DTYPE = torch.float32
VARIANT = VARIANTS["bert_sdpa"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with UniPELT ("task", active) and a LoRA ("other"), and a file beside its module."""
    path = tmp_path_factory.mktemp("export") / "model.pt"
    module = torchgraft.graft(grafted("bert_sdpa", DTYPE, "unipelt"), "lora", "other", active="task")
    torch.jit.save(module, str(path), _extra_files={"note": b"kept", "bytes": b"\xff"})
    return path


def close(a: Any, b: Any, tolerance: float) -> bool:
    """Compares the hidden states of two results."""
    return difference(VARIANT.hidden(a), VARIANT.hidden(b)) <= tolerance


def load(path: Path) -> torch.export.ExportedProgram:
    with quiet():
        return torch.export.load(path)


@pytest.mark.quick
def test_an_exported_file_runs_and_lists_its_adapters(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt2"
    done = run_here("graft.py", "export", model, "-o", out)
    sizes = "input_ids [*, *], attention_mask [*, *], adapter_ids [*]"
    assert done.stdout == f"{out}: {sizes}; adapters 0 task, 1 other\n"
    assert done.stderr == "warning: export: 'bytes', which the model carries, is left out: it is no UTF-8 text\n"
    extra = {"note": "", "torchgraft.json": ""}
    with quiet():
        program = torch.export.load(out, extra_files=extra)
    assert extra["note"] == "kept" and json.loads(extra["torchgraft.json"])["adapter_ids"] is True
    module = torch.jit.load(str(model))
    for batch in varied_batches(VARIANT, DTYPE):
        arguments = VARIANT.arguments(batch)
        ids = torch.tensor([0, 1, -1, 0][: batch.ids.size(0)])
        with torch.no_grad():
            assert close(program.module()(*arguments, ids), module(*arguments, ids), 1e-6)
    for command in (["list"], ["list", "--json"]):
        of_program, of_module = (run_here("graft.py", *command, path) for path in (out, model))
        assert (of_program.returncode, of_program.stdout) == (0, of_module.stdout)


def _described_anew(old: Path, new: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of an exported file, in whose description `change` has changed the first adapter's entry."""
    with zipfile.ZipFile(old) as archive, zipfile.ZipFile(new, "w") as written:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("extra/torchgraft.json"):
                description = json.loads(content)
                change(description["adapters"][0])
                content = json.dumps(description).encode()
            written.writestr(name, content)
    return new


@pytest.mark.quick
def test_descriptions_of_before_and_of_others_are_read_by_name(model: Path, tmp_path: Path) -> None:
    out, new = tmp_path / "out.pt2", tmp_path / "new.pt2"
    assert run_here("graft.py", "export", model, "-o", out).returncode == 0
    done = run_here("graft.py", "list", "--json", _described_anew(out, new, lambda entry: entry.pop("gate_pooling")))
    assert done.returncode == 0, done.stderr
    assert [entry["gate_pooling"] for entry in json.loads(done.stdout)] == ["", ""]
    for change, told in (
        (lambda entry: entry.update(colour="red"), "got 'colour', too"),
        (lambda entry: entry.pop("name"), "an adapter's entry with 'name' of type str, got None"),
        (lambda entry: entry.update(parameters="many"), "'parameters' of type int, got 'many'"),
        (lambda entry: entry.update(by_location={"a": "b"}), "expected numbers in 'by_location'"),
    ):
        done = run_here("graft.py", "list", _described_anew(out, new, change))
        assert (done.returncode, done.stdout) == (1, "") and told in done.stderr, done.stderr
        assert done.stderr.startswith(f"graft: error: {new}: ")


def test_a_lowered_file_calls_no_operator_of_the_library(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt2"
    done = run_here("graft.py", "export", model, "-o", out, "--lowered", "--gates")
    assert done.returncode == 0, done.stderr
    program, module = load(out), torch.jit.load(str(model))
    assert {str(node.target).split(".")[0] for node in program.graph.nodes if "aten" in str(node.target)} == {"aten"}
    assert not any("torchgraft" in str(node.target) for node in program.graph.nodes)
    arguments = VARIANT.arguments(varied_batches(VARIANT, DTYPE)[0])
    ids = torch.tensor([0, -1, 1])
    with torch.no_grad():
        result, gates = program.module()(*arguments, ids)
        expected, expected_gates = module.forward_with_gates(*arguments, ids)
    assert close(result, expected, 1e-5)
    assert difference(gates["layer_1.self_prefix"][:1], expected_gates["task"][1]["self_prefix"]) <= 1e-6


def test_static_sizes_and_no_ids(model: Path, tmp_path: Path) -> None:
    batch = varied_batches(VARIANT, DTYPE)[0]
    torch.save(VARIANT.arguments(batch), tmp_path / "example.pt")
    options = ["--static", "--no-ids", "--example", tmp_path / "example.pt"]
    done = run_here("graft.py", "export", model, "-o", tmp_path / "out.pt2", *options)
    assert done.stdout.startswith(f"{tmp_path / 'out.pt2'}: input_ids [3, 11], attention_mask [3, 11]; adapters")
    module = torch.jit.load(str(model))
    with torch.no_grad():
        expected = module(*VARIANT.arguments(batch))
        assert close(load(tmp_path / "out.pt2").module()(*VARIANT.arguments(batch)), expected, 1e-6)


def test_banks_are_buffers_of_their_own_names_and_memory() -> None:
    module = grafted("bert_sdpa", DTYPE, "unipelt")
    batch = VARIANT.arguments(varied_batches(VARIANT, DTYPE)[0])
    program = torchgraft.export(module, dict(zip(("input_ids", "attention_mask"), batch, strict=True)))
    bank = "adapters.layer_0.selfattn_lora_q.lora_a"
    assert bank in program.graph_signature.buffers and "adapter_ids" in program.graph_signature.user_inputs
    assert program.state_dict[bank].data_ptr() == module.state_dict()[bank].data_ptr()
    assert set(program.graph_signature.parameters) <= {name for name, _ in module.named_parameters()}


def _gradients(run, parameters: dict[str, Tensor], arguments: tuple) -> dict[str, Tensor]:
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    found = torch.autograd.grad(VARIANT.hidden(run(*arguments)).square().mean(), [parameters[name] for name in names])
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("lowered", [False, True])
def test_gradients_are_the_modules(lowered: bool) -> None:
    module = torchgraft.graft(base("bert_sdpa", DTYPE), "unipelt", "task", trainable=True)
    arguments = VARIANT.arguments(varied_batches(VARIANT, DTYPE)[0])
    program = torchgraft.export(module, arguments, lowered=lowered).module()
    ids = torch.tensor([0, -1, 0])
    expected = _gradients(module, dict(module.named_parameters()), (*arguments, ids))
    found = _gradients(program, dict(program.named_parameters()), (*arguments, ids))
    assert sorted(found) == sorted(expected) and len(expected) > 10
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_base_alone_is_exported_too() -> None:
    module = base("bert_sdpa", DTYPE)
    batches = [VARIANT.arguments(batch) for batch in varied_batches(VARIANT, DTYPE)]
    program = torchgraft.export(module, batches[0])
    with torch.no_grad():
        assert close(program.module()(*batches[1]), module(*batches[1]), 1e-6)
    again = torchgraft.from_program(program)
    assert torchgraft.inspect(again)["layers"] == torchgraft.inspect(module)["layers"]


class Scripted(nn.Module):
    """What a trace has none of: loops, branches on sizes, dicts, default arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: Tensor, offset: Tensor | None = None, factor: float = 2.0) -> dict[str, Tensor]:
        sizes = [x.size(0), x.size(1)]
        for step in self.steps:
            x = step(x) * factor
        if offset is not None:
            x = x + offset
        for i in range(3):
            x = x + i
        if len(sizes) > 1 and sizes[1] > 1:
            x = x / float(sizes[1])
        return {"x": x.view(sizes[0], -1)}


def test_scripted_control_flow() -> None:
    module = torch.jit.script(Scripted().eval())
    program = torchgraft.export(module, torch.randn(2, 3, 4)).module()
    with_offset = torchgraft.export(module, (torch.randn(2, 3, 4), torch.randn(4))).module()
    x, offset = torch.randn(5, 7, 4), torch.randn(4)
    assert difference(program(x)["x"], module(x)["x"]) <= 1e-6
    assert difference(with_offset(x, offset)["x"], module(x, offset)["x"]) <= 1e-6


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            x = x + 1
        return x


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2, 3)


def test_what_no_program_can_do_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(torchgraft.GraftError, match="a program cannot branch on what tensors hold"):
        torchgraft.export(torch.jit.script(Branching()), torch.randn(2, 3))
    with pytest.raises(torchgraft.GraftError, match="nothing is grafted onto the module"):
        torchgraft.export(torch.jit.script(Branching()), torch.randn(2, 3), gates=True)
    module = torch.jit.load(str(model))
    with pytest.raises(torchgraft.GraftError, match="the module does not run on the example inputs"):
        torchgraft.export(module, torch.zeros(2, 3))
    with pytest.raises(torchgraft.GraftError, match="no argument 'ids'; it has: input_ids, attention_mask"):
        torchgraft.export(module, {"ids": torch.zeros(2, 3)})
    with pytest.raises(torchgraft.GraftError, match="the example has no 'input_ids'"):
        torchgraft.export(module, {"attention_mask": torch.ones(2, 3)})
    with pytest.warns(UserWarning, match="takes inputs of one size only"):
        torchgraft.export(torch.jit.script(Fixed()), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="works on TorchScript modules"):
        torchgraft.export(nn.Linear(2, 2), torch.zeros(2, 2))


_WRONG = {
    "nothing to write": ([], 2, "nothing to write: give -o OUT.pt2"),
    "another ending": (["-o", "{tmp}/out.pt"], 2, "--output: expected a file ending in .pt2"),
    "the ending of a module": (["-o", "{model}"], 2, "--output: expected a file ending in .pt2"),
    "a folder that is missing": (["-o", "{tmp}/none/out.pt2"], 1, "does not exist"),
    "an example of another kind": (["-o", "{tmp}/out.pt2", "--example", "{model}"], 1, "cannot read example inputs"),
}


@pytest.mark.parametrize("case", _WRONG)
def test_a_wrong_command_is_one_line(case: str, model: Path, tmp_path: Path) -> None:
    arguments, status, message = _WRONG[case]
    done = run_here("graft.py", "export", model, *[text.format(tmp=tmp_path, model=model) for text in arguments])
    assert done.returncode == status and message in done.stderr
    assert done.stderr.startswith("graft: error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is not None, reason="onnxscript is installed")
def test_a_missing_package_is_named_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    done = run_here("graft.py", "export", model, "-o", tmp_path / "out.pt2", "--onnx", tmp_path / "out.onnx")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install -r requirements/onnx.txt" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_model_that_reads_no_text_needs_an_example(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "linear.pt"))
    done = run_here("graft.py", "export", tmp_path / "linear.pt", "-o", tmp_path / "out.pt2")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    options = ["-o", tmp_path / "out.pt2", "--config", "lora", "--name", "a"]
    done = run_here("graft.py", "add", tmp_path / "linear.pt", *options)
    assert "a .pt2 is an exported program; write a .pt, then use torchgraft export on it" in done.stderr
