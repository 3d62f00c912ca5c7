"""ONNX files of grafted modules give in ONNX Runtime what the modules give: mixed batches, other sizes."""

from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

import torchgraft
from all_cases import CASES, methods
from oracle import difference
from program_cases import DTYPE, program_parameters, traced

pytest.importorskip("onnx", reason="requirements/onnx.txt is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="requirements/onnx.txt is not installed")
pytest.importorskip("onnxscript", reason="requirements/onnx.txt is not installed")

# Strict: a case that begins to pass must leave the list.
NOT_YET = {
    "deberta_v2_shared_eager": "rows of one batch cannot have different adapters in this model",
    "torch_encoder_post_nested": "its nested tensors have sizes that depend on the mask",
} | dict.fromkeys(
    ("deberta_eager", "beit_relative_eager", "t5_eager", "t5_gated_eager", "mpnet_eager"),
    "torch.onnx computes attention with a bias in a memory layout that the view behind it does not fit",
)
_TOLERANCE = 1e-5


def _run(session: onnxruntime.InferenceSession, arguments: tuple) -> list[Tensor]:
    given = {each.name: value for each, value in zip(session.get_inputs(), arguments, strict=True)}
    found = session.run(None, {name: value.numpy() for name, value in given.items()})
    return [torch.from_numpy(numpy.asarray(value)) for value in found]


@pytest.mark.parametrize("name", program_parameters(NOT_YET, often=("bert_eager", "gpt2_eager")))
def test_a_file_gives_what_the_module_gives(name: str, tmp_path: Path) -> None:
    case, used, file = CASES[name], methods(name)[:2], tmp_path / "model.onnx"
    grafted = case.reference.graft(traced(name), used, DTYPE)
    torchgraft.save_onnx(torchgraft.export(grafted, case.arguments(DTYPE, 0), lowered=True), file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for seed in (1, 2):
        arguments = case.arguments(DTYPE, seed)
        with torch.no_grad():
            rows = grafted.grafted_forward(*arguments)[1][0].size(0)
            ids = torch.tensor([1, 0, -1, 1, 0][:rows])
            expected = case.hidden(grafted(*arguments, adapter_ids=ids))
        outputs = _run(session, (*arguments, ids))
        result = case.hidden(outputs[0] if len(outputs) == 1 else tuple(outputs))
        assert difference(result, expected) <= _TOLERANCE
