"""AOTInductor packages of grafted modules give what the modules give, at other sizes and in mixed batches. Each takes
half a minute to compile: tests/python/programs/ has one in the default tests."""

from pathlib import Path

import pytest
import torch

import torchgraft
from all_cases import CASES, methods
from oracle import difference
from program_cases import DTYPE, traced

_FAMILIES = ["bert_sdpa", "gpt2_sdpa", "llama_sdpa", "vit_sdpa", "t5_eager", "bart_sdpa", "distilbert_sdpa",
             "own_einsum"]  # fmt: skip


@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize("name", _FAMILIES)
@pytest.mark.parametrize("freezing", [True, False])
def test_a_package_gives_what_the_module_gives(name: str, freezing: bool, tmp_path: Path) -> None:
    case = CASES[name]
    grafted = case.reference.graft(traced(name), methods(name)[:2], DTYPE)
    with torch.no_grad():
        program = torchgraft.export(grafted, case.arguments(DTYPE, 0))
        torchgraft.compile_package(program, tmp_path / "out.pt2", freezing=freezing)
        package = torch._inductor.aoti_load_package(str(tmp_path / "out.pt2"))
        for seed in (0, 1, 2):
            arguments = case.arguments(DTYPE, seed)
            ids = torch.tensor([1, 0, -1, 0][: arguments[0].size(0)])
            expected = case.hidden(grafted(*arguments, ids))
            assert difference(case.hidden(package(*arguments, ids)), expected) <= 1e-5
