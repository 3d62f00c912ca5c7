"""A program of a module with compositions, whose rows all use the active one: equal to `adapters==1.3.0`."""

from pathlib import Path

import pytest
import torch

import torchgraft
from grafted import base
from models import VARIANTS, Batch, make_batch
from oracle import difference
from scripts_here import run_here
from test_compositions import DTYPE, TOLERANCE, bank, expected_states, saved
from torchgraft import Average, BatchSplit, MultiTask, Parallel, Stack

VARIANT = VARIANTS["bert_sdpa"]
BATCH = make_batch([9, 4, 7], 9, DTYPE, 3)


def hidden(program: torch.export.ExportedProgram, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return VARIANT.hidden(program.module()(*VARIANT.arguments(batch)))


def composed(block, **options) -> torch.jit.ScriptModule:
    module = torchgraft.compose(bank("bert_sdpa", "bn", "bn2", "lora", "lora2"), "c", block, verify=False, **options)
    module.activate("c")
    return module


def in_float32() -> torch.jit.ScriptModule:
    directories = {part: saved("bert_sdpa", part).directory for part in ("bn", "bn2")}
    module = torchgraft.graft(base("bert_sdpa", torch.float32), adapters=directories, verify=False)
    module = torchgraft.compose(module, "c", Parallel("bn", "bn2"), verify=False)
    module.activate("c")
    return module


SLOW = pytest.mark.slow(seconds=5)


@pytest.mark.parametrize(
    ("block", "lowered"),
    [
        (Parallel("bn", "bn2"), False),
        (BatchSplit("bn", Stack("bn", "bn2"), batch_sizes=[1, 2]), False),
        pytest.param(Parallel("lora", "lora2"), True, marks=SLOW),
        pytest.param(Parallel(Stack("bn", "bn2"), Average("bn", "bn2")), True, marks=SLOW),
        pytest.param(Stack("lora", Parallel("bn", "bn2")), False, marks=SLOW),
    ],
    ids=str,
)
def test_a_program_equals_the_library(block, lowered: bool) -> None:
    """Of any number of rows and tokens, but for a BatchSplit."""
    module = composed(block, example=VARIANT.arguments(BATCH) if lowered else None)
    program = torchgraft.export(module, VARIANT.arguments(BATCH), adapter_ids=False, lowered=lowered)
    others = [make_batch([5], 5, DTYPE, 4), make_batch([6, 4, 3, 2], 6, DTYPE, 5), make_batch([3, 3, 2], 3, DTYPE, 6)]
    splits = isinstance(block, BatchSplit)
    for batch in [BATCH] if splits else [BATCH, *others]:
        assert difference(hidden(program, batch), expected_states("bert_sdpa", batch, block)) <= TOLERANCE
    if splits:
        with pytest.raises(AssertionError, match="Guard failed"):
            hidden(program, others[1])


def test_a_plain_adapter_beside_a_composition() -> None:
    module = composed(Parallel("bn", "bn2"))
    module.activate("lora")
    program = torchgraft.export(module, VARIANT.arguments(BATCH), adapter_ids=False)
    assert difference(hidden(program, BATCH), expected_states("bert_sdpa", BATCH, Stack("lora"))) <= TOLERANCE


def test_the_command_exports_and_lists_it(tmp_path: Path) -> None:
    composed(Parallel("bn", "bn2")).save(str(tmp_path / "c.pt"))
    torch.save(VARIANT.arguments(BATCH), tmp_path / "x.pt")
    options = ["--no-ids", "--example", tmp_path / "x.pt", "-o", tmp_path / "c.pt2"]
    done = run_here("graft.py", "export", tmp_path / "c.pt", *options)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    of_program, of_module = (run_here("graft.py", "list", tmp_path / name) for name in ("c.pt2", "c.pt"))
    assert (of_program.returncode, of_program.stdout) == (0, of_module.stdout)
    assert "Parallel(bn, bn2)" in of_module.stdout


@pytest.mark.quick
def test_what_no_program_can_do_is_refused() -> None:
    module = composed(Parallel("bn", "bn2"))
    with pytest.raises(torchgraft.GraftError, match="activate one, and export it for all rows .adapter_ids=False"):
        torchgraft.export(module, VARIANT.arguments(BATCH))
    with pytest.raises(torchgraft.GraftError, match="compositions, whose gates no program returns"):
        torchgraft.export(module, VARIANT.arguments(BATCH), adapter_ids=False, gates=True)
    module = composed(MultiTask("lora", "lora2"))
    with pytest.raises(torchgraft.GraftError, match=r"MultiTask\(lora, lora2\), needs the task of each row"):
        torchgraft.export(module, VARIANT.arguments(BATCH), adapter_ids=False)


@pytest.mark.slow(seconds=8)
def test_onnx_runtime_repeats_rows(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="requirements/onnx.txt is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="requirements/onnx.txt is not installed")
    program = torchgraft.export(in_float32(), VARIANT.arguments(BATCH), adapter_ids=False, lowered=True)
    torchgraft.save_onnx(program, tmp_path / "c.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "c.onnx"), providers=["CPUExecutionProvider"])
    for batch in (BATCH, make_batch([6, 4, 3, 2], 6, DTYPE, 5)):
        names = [given.name for given in session.get_inputs()]
        inputs = dict(zip(names, [x.numpy() for x in VARIANT.arguments(batch)], strict=True))
        found = torch.from_numpy(session.run(None, inputs)[0]).double()
        assert difference(found, expected_states("bert_sdpa", batch, Parallel("bn", "bn2"))) <= 1e-5


@pytest.mark.slow(seconds=17)
def test_a_package_repeats_rows(tmp_path: Path) -> None:
    batches = [make_batch(lengths, lengths[0], torch.float32, 7) for lengths in ([9, 4, 7], [5, 2], [4])]
    program = torchgraft.export(in_float32(), VARIANT.arguments(batches[0]), adapter_ids=False)
    torchgraft.compile_package(program, tmp_path / "c.aoti.pt2")
    package = torch._inductor.aoti_load_package(str(tmp_path / "c.aoti.pt2"))
    for batch in batches:
        with torch.no_grad():
            found = VARIANT.hidden(package(*VARIANT.arguments(batch))).double()
        assert difference(found, expected_states("bert_sdpa", batch, Parallel("bn", "bn2"))) <= 1e-5
