"""Prints docs/models.md: how far grafted models are from their references.

Run as scripts/test does (TORCHGRAFT_LIBRARY_DIR set):
    .venv/bin/python tests/python/architectures/make_models_table.py > docs/models.md
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[3] / "python")]

import torch  # noqa: E402
from case import METHODS  # noqa: E402
from hugging_face_cases import CASES  # noqa: E402
from oracle import difference  # noqa: E402
from test_architectures import NOT_YET, _LEFT_OUT  # noqa: E402

_HEAD = f"""# Models

The largest absolute difference from `adapters==1.3.0` (float32, hidden states and gates, two batches that were not
traced) on small random models. Made by `tests/python/architectures/make_models_table.py`; the same cases are tests
(`test_architectures.py`, float32 and float64). *frozen* is after `torch.jit.freeze`, with UniPELT.

| traced model | {" | ".join(METHODS)} | frozen |
|---|{"---|" * (len(METHODS) + 1)}"""


def _largest(case, base, method: str) -> float:
    grafted = case.reference.graft(base, method, torch.float32)
    largest = 0.0
    for seed in (1, 2):
        arguments = case.arguments(torch.float32, seed)
        expected, expected_gates = case.reference.run(grafted, method, arguments)
        with torch.no_grad():
            result, gates = grafted.forward_with_gates(*arguments)
        largest = max(largest, difference(case.hidden(result), expected))
        for layer, locations in expected_gates.items():
            for location, gate in locations.items():
                largest = max(largest, difference(gates["task"][layer][location], gate))
    return largest


def _cell(case, base, method: str) -> str:
    if method in case.without:
        return "-"
    if (case.name, method) in NOT_YET:
        return "not yet"
    return f"{_largest(case, base, method):.1e}"


def main() -> None:
    print(_HEAD)
    for name, case in CASES.items():
        if name in _LEFT_OUT:
            continue
        base = case.to_script("traced", torch.float32)
        cells = [_cell(case, base, method) for method in METHODS]
        cells.append(_cell(case, torch.jit.freeze(base), "unipelt"))
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n*not yet*: " + "; ".join(sorted(set(NOT_YET.values()))) + ".")


if __name__ == "__main__":
    main()
