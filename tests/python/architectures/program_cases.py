"""Cases as exported programs: which of them torch.export takes, and how."""

import functools
import io

import pytest
import torch
from torch.export import Dim

from all_cases import CASES, base
from torchgraft.programs.read_program import quiet

# What torch.export refuses, and why. Strict: a case that begins to pass must leave the list.
_VALUES = "the eager model branches on the values of its mask"
NOT_EXPORTED = {
    "bart_eager": "the eager model adds masks of two lengths",
    "mbart_eager": "the eager model adds masks of two lengths",
} | dict.fromkeys(
    (
        "torch_encoder_post_sequence_first", "torch_encoder_post_no_bias", "torch_encoder_pre",
        "torch_encoder_pre_sequence_first", "torch_decoder_post", "torch_decoder_post_sequence_first",
        "torch_decoder_pre", "torch_transformer_pre_masks",
    ),
    _VALUES,
)  # fmt: skip

# One of each kind, in the default tests; the others are slow.
DEFAULT = ("bert_eager", "vit_eager", "llama_sdpa", "gpt2_eager", "own_einsum")
DTYPE = torch.float32


def open_sizes(first: tuple, second: tuple) -> tuple:
    """dynamic_shapes for torch.export: the sizes in which two examples differ."""
    return tuple(
        {dim: Dim.AUTO for dim in range(a.dim()) if a.size(dim) != b.size(dim)} or None
        for a, b in zip(first, second, strict=True)
    )


@functools.cache
def program(name: str) -> torch.export.ExportedProgram:
    """The eager model of a case exported, saved and loaded. Do not change it."""
    case = CASES[name]
    first, second = case.arguments(DTYPE, 0), case.arguments(DTYPE, 1)
    file = io.BytesIO()
    with quiet(), torch.no_grad():
        exported = torch.export.export(case.make(DTYPE), first, dynamic_shapes=open_sizes(first, second), strict=False)
        torch.export.save(exported, file)
        file.seek(0)
        return torch.export.load(file)


def traced(name: str) -> torch.jit.ScriptModule:
    return base(name, CASES[name].forms[0], DTYPE)


def program_parameters(known: dict[str, str], often: tuple[str, ...] = DEFAULT) -> list:
    """Every case by name. `known`: what does not work yet, and why. `often`: those that are not slow."""
    parameters = []
    for name in CASES:
        marks = [pytest.mark.xfail(reason=known[name], strict=True)] if name in known else []
        if name not in often:
            marks.append(pytest.mark.slow(seconds=5))
        parameters.append(pytest.param(name, marks=marks))
    return parameters
