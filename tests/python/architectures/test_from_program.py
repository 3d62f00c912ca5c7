"""Exported programs as bases: seen as their traces are, and grafted to the same results."""

import json
from typing import Any

import pytest
import torch

import torchgraft
from all_cases import CASES, methods
from oracle import assert_gates_close, difference
from program_cases import DTYPE, NOT_EXPORTED, program, program_parameters, traced

# The trace gives zeros at padding. Strict: a case that begins to pass must leave the list.
DIFFERS = {"torch_encoder_post_nested": "torch.export takes its branch without nested tensors, which leaves padding"}

ONE_ADAPTER = {"deberta_v2_shared_eager"}  # per batch: its LoRAs are on relative positions, which all rows share


def _layers(module: torch.jit.ScriptModule) -> list[dict[str, Any]]:
    """What inspect() sees, without its notes: they name lines of the model's source."""
    layers = json.loads(json.dumps(torchgraft.inspect(module)["layers"]))
    for layer in layers:
        del layer["notes"]
    return layers


@pytest.mark.parametrize("name", program_parameters(NOT_EXPORTED | DIFFERS))
def test_a_program_is_a_base_as_its_trace_is(name: str) -> None:
    case = CASES[name]
    script, trace = torchgraft.from_program(program(name)), traced(name)
    assert _layers(script) == _layers(trace) != []
    ours, theirs = (case.reference.graft(each, methods(name)[:2], DTYPE) for each in (script, trace))
    for seed in (1, 2):
        arguments = case.arguments(DTYPE, seed)
        with torch.no_grad():
            assert difference(case.hidden(script(*arguments)), case.hidden(trace(*arguments))) <= 1e-5
            for method in methods(name)[:2]:
                ours.activate(method)
                theirs.activate(method)
                result, gates = ours.forward_with_gates(*arguments)
                expected, expected_gates = theirs.forward_with_gates(*arguments)
                assert difference(case.hidden(result), case.hidden(expected)) <= 1e-5
                if gates:
                    assert_gates_close(gates[method], expected_gates[method], 1e-5)
            rows = ours.grafted_forward(*arguments)[1][0].size(0)  # a gate is [rows, columns]
            ids = torch.ones(rows).long() if name in ONE_ADAPTER else torch.tensor([1, 0, -1, 0])[:rows]
            result, expected = ours(*arguments, ids), theirs(*arguments, ids)
            assert difference(case.hidden(result), case.hidden(expected)) <= 1e-5
