"""Packages of eight families run in examples/serve_aoti, a C++ program without Python, and take other adapters there.
Each takes half a minute to compile; tests/python/architectures/test_packages.py runs them in Python."""

import json
import sys
from pathlib import Path

import pytest
import torch

import torchgraft
from hosts_support import ROOT, run

sys.path[:0] = [str(ROOT / "tests" / "python"), str(ROOT / "tests" / "python" / "architectures")]

from all_cases import CASES, methods  # noqa: E402
from program_cases import DTYPE, traced  # noqa: E402

FAMILIES = ["bert_sdpa", "gpt2_sdpa", "llama_sdpa", "vit_sdpa", "t5_eager", "bart_sdpa", "distilbert_sdpa",
            "own_einsum"]  # fmt: skip


def _noisy(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    with torch.no_grad():
        for bank in module.adapters.parameters():
            if bank.isfinite().all():
                bank.add_(torch.randn_like(bank) * 0.1)
    return module


@pytest.mark.slow(seconds=45)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_mixed_batch_and_a_swap_in_cpp(name: str, serve_aoti: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    module = case.reference.graft(traced(name), methods(name)[:2], DTYPE)
    module.save(tmp_path / "model.pt")
    other = _noisy(torch.jit.load(tmp_path / "model.pt"))
    other.save(tmp_path / "other.pt")
    with torch.no_grad():
        program = torchgraft.export(module, case.arguments(DTYPE, 0))
        torchgraft.compile_package(program, tmp_path / "model.aoti.pt2")
    arguments = case.arguments(DTYPE, 1)
    ids = [1, 0, -1, 0][: arguments[0].size(0)]
    document = {
        "inputs": [x.double().tolist() if x.is_floating_point() else x.tolist() for x in arguments],
        "dtypes": ["float32" if x.is_floating_point() else str(x.dtype).removeprefix("torch.") for x in arguments],
    }
    (tmp_path / "inputs.json").write_text(json.dumps(document))
    command = [tmp_path / "model.aoti.pt2", tmp_path / "inputs.json", "--output", tmp_path / "out.json"]
    command += ["--adapter-ids", ",".join(map(str, ids))]
    results = []
    for options, held in (([], module), (["--model", tmp_path / "model.pt", "--banks", tmp_path / "other.pt"], other)):
        run(serve_aoti, *command, *options)
        found = torch.tensor(json.loads((tmp_path / "out.json").read_text())["output"]["values"], dtype=DTYPE)
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(held(*arguments, torch.tensor(ids)))[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        results.append(found)
    assert (results[0] - results[1]).abs().max() > 1e-3
