"""ONNX files give in ONNX Runtime what the modules give: other sizes, mixed batches, gates, other banks."""

import json
from pathlib import Path

import pytest
import torch

import torchgraft
from grafted import base
from models import VARIANTS
from oracle import varied_batches
from scripts_here import run_here
from small import randomised

onnx = pytest.importorskip("onnx", reason="requirements/onnx.txt is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="requirements/onnx.txt is not installed")
pytest.importorskip("onnxscript", reason="requirements/onnx.txt is not installed")

DTYPE = torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt (a BERT with "first": UniPELT and "second": MAM), and its model.onnx with gates."""
    folder = tmp_path_factory.mktemp("onnx")
    module = base("bert_eager", DTYPE)
    for name, config in (("first", "unipelt"), ("second", "mam")):
        module = torchgraft.graft(module, config, name)
    randomised(module)
    module.save(str(folder / "model.pt"))
    done = run_here("graft.py", "export", folder / "model.pt", "--onnx", folder / "model.onnx", "--gates")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


def _run(session, arguments: tuple) -> dict[str, torch.Tensor]:
    names = [each.name for each in session.get_inputs()]
    given = {name: value.numpy() for name, value in zip(names, arguments, strict=True)}
    outputs = [each.name for each in session.get_outputs()]
    return dict(zip(outputs, map(torch.from_numpy, session.run(None, given)), strict=True))


def test_a_file_gives_what_the_module_gives(folder: Path) -> None:
    module = torch.jit.load(str(folder / "model.pt"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    variant = VARIANTS["bert_eager"]
    for batch in varied_batches(variant, DTYPE):
        ids = torch.tensor([0, 1, -1, 1][: batch.ids.size(0)])
        outputs = _run(session, (*variant.arguments(batch), ids))
        with torch.no_grad():
            result, gates = module.forward_with_gates(*variant.arguments(batch), ids)
        torch.testing.assert_close(outputs["result"], variant.hidden(result), rtol=1e-4, atol=1e-5)
        found = outputs["layer_1.self_prefix"][ids == 0]
        torch.testing.assert_close(found, gates["first"][1]["self_prefix"], rtol=1e-4, atol=1e-5)


def test_other_banks_are_written_into_a_file(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(str(folder / "model.onnx"))
    described = json.loads({entry.key: entry.value for entry in model.metadata_props}["torchgraft"])
    assert [adapter["name"] for adapter in described["adapters"]] == ["first", "second"]
    module = torch.jit.load(str(folder / "model.pt"))
    banks = {name: 1.5 * value for name, value in module.state_dict().items() if name.endswith(("lora_b", "up_weight"))}
    changed = 0
    for initializer in model.graph.initializer:
        if initializer.name in banks:
            initializer.CopyFrom(onnx.numpy_helper.from_array(banks[initializer.name].numpy(), initializer.name))
            changed += 1
    assert changed == len(banks)
    onnx.save(model, str(tmp_path / "other.onnx"))
    with torch.no_grad():
        for name, value in banks.items():
            module.state_dict()[name].copy_(value)
    variant = VARIANTS["bert_eager"]
    arguments = (*variant.arguments(varied_batches(variant, DTYPE)[0]), torch.tensor([0, 1, -1]))
    session = onnxruntime.InferenceSession(str(tmp_path / "other.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = variant.hidden(module(*arguments))
    torch.testing.assert_close(_run(session, arguments)["result"], expected, rtol=1e-4, atol=1e-5)


def test_a_program_with_operators_of_the_library_is_refused(folder: Path, tmp_path: Path) -> None:
    module = torch.jit.load(str(folder / "model.pt"))
    ids = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(torchgraft.GraftError, match="export the module with lowered=True"):
        torchgraft.save_onnx(torchgraft.export(module, (ids, ids)), tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []
