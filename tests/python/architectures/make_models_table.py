"""Prints docs/models.md: how far grafted models are from their references.

Run as scripts/test does (TORCHGRAFT_LIBRARY_DIR set), about four minutes:
    .venv/bin/python tests/python/architectures/make_models_table.py > docs/models.md
"""

import json
import sys
import textwrap
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[3] / "python")]

import torch  # noqa: E402

from all_cases import CASES, FORMS, FROZEN_NOT_YET, METHODS, OPTIMIZED_NOT_YET, methods  # noqa: E402
from hugging_face_models import FAMILIES  # noqa: E402
from oracle import difference  # noqa: E402
from oracle_reference import OracleReference  # noqa: E402
from torchgraft._libraries import patcher  # noqa: E402

NOT_YET = {"frozen": FROZEN_NOT_YET, "optimized": OPTIMIZED_NOT_YET}
COLUMNS = [*METHODS, *NOT_YET]

_HEAD = f"""# Models

The table shows the largest absolute difference of grafted small random models from their reference: float32, hidden
states and gates, two batches other than the one that was traced. The reference is `adapters==1.3.0` where the library
supports the model, else a restatement of the definitions in plain PyTorch (`restated_reference.py`; the tests compare
it with the library on BERT, ViT and BART). `tests/python/architectures/make_models_table.py` makes this page. The same
cases are tests: `test_architectures.py` (float32 and float64), `test_forms.py`, `test_canonical.py`. *frozen*: the
model went through `torch.jit.freeze`; *optimized*: also through `torch.jit.optimize_for_inference`; both columns use
the first method of the row. *fused*: the model was traced without grad mode, where torch.nn runs a whole layer as one
operator.

| model | form | reference | {" | ".join(COLUMNS)} |
|---|---|---|{"---|" * len(COLUMNS)}"""


def _largest(case, base, method: str) -> float:
    grafted = case.reference.graft(base, [method], torch.float32)
    largest = 0.0
    for seed in (1, 2):
        arguments = case.arguments(torch.float32, seed)
        expected, expected_gates = case.reference.run(grafted, method, arguments)
        with torch.no_grad():
            result, gates = grafted.forward_with_gates(*arguments)
        largest = max(largest, difference(case.hidden(result), expected))
        for layer, locations in expected_gates.items():
            for location, gate in locations.items():
                largest = max(largest, difference(gates[method][layer][location], gate))
    return largest


def _cell(case, base, method: str) -> str:
    if method in case.without:
        return "-"
    return f"{_largest(case, base, method):.1e}"


def _row(name: str, form: str) -> str:
    case = CASES[name]
    base = case.to_script(form, torch.float32)
    cells = [_cell(case, base, method) for method in METHODS]
    frozen = torch.jit.freeze(base.eval())
    optimized = torch.jit.optimize_for_inference(torch.jit.freeze(base))  # it changes what it is given
    for column, changed in (("frozen", frozen), ("optimized", optimized)):
        known = (name, form) in NOT_YET[column]
        cells.append("not yet" if known else _cell(case, changed, methods(name)[0]))
    reference = "adapters" if isinstance(case.reference, OracleReference) else "restated"
    return f"| {name} | {form} | {reference} | {' | '.join(cells)} |"


# Families that have no row in the table: test_other_families.py and test_encoder_decoder.py compare them.
_OTHERS = {"bert_generation": "bert-generation", "whisper": "whisper", "plbart": "plbart", "mt5": "mt5",
           "encoder_decoder (of BERTs)": "encoder-decoder", "clip (whole)": "clip"}  # fmt: skip


def _said(model_type: str, config: str) -> str:
    """What is said of a directory that the library wrote for such a model; "equal" when nothing is."""
    text = json.dumps({"model_type": model_type, "config": config})
    refused, warned = patcher().library_difference(text)
    if refused:
        return "refused: " + refused.split(", which torchgraft")[0]
    return f"warned: {warned}" if warned else "equal"


def directories() -> str:
    """The section on directories of the library: equal, refused or warned of, for each family."""
    lines = [
        "## Directories of the library",
        "",
        "Adapters that `adapters==1.3.0`, unrepaired, has trained give its results (*equal*), are refused, or a "
        "warning names the effect that the directory does not tell: "
        "[adapters.md](adapters.md#what-the-library-computes-otherwise). `test_drawn_cases.py` draws families, "
        "configurations, forms of the module and directories, of PEFT too.",
        "",
    ]
    by_result: dict[tuple[str, ...], list[str]] = {}
    model_types = {family: made.config_class.model_type for family, made in FAMILIES.items()} | _OTHERS
    for family, model_type in model_types.items():
        said = tuple(_said(model_type, config) for config in ("lora", "double_seq_bn", "prefix_tuning"))
        by_result.setdefault(said, []).append(family)
    for said, families in by_result.items():
        names = ("LoRA", "bottlenecks", "prefixes") if len(set(said)) > 1 else ("all",)
        results = dict(zip(names, said, strict=False))
        different = "; ".join(f"{method}: {result}" for method, result in results.items() if result != "equal")
        different += "; all else equal" if "equal" in said and different else ""
        lines.append(f"- {', '.join(families)}: {different or 'equal'}.")
    lines += [
        "- xmod: refused: a trace holds which rows had which language.",
        "- All: a base traced under `torch.autocast`, or with weights of several dtypes, is refused where a prefix "
        "or a bottleneck meets another dtype than that of the first query projection. LoRAs have that of their linear "
        "map's weight.",
    ]
    wrapped = [textwrap.fill(line, 120, subsequent_indent="  " if line.startswith("- ") else "",
                             break_long_words=False, break_on_hyphens=False) for line in lines]  # fmt: skip
    return "\n".join(wrapped)


def main() -> None:
    warnings.simplefilter("ignore")
    print(_HEAD)
    for name, form in FORMS:
        print(_row(name, form))
    print("\n*-*: the model, or the library with it, has no such location. *not yet*:\n")
    for reason in sorted(set(OPTIMIZED_NOT_YET.values())):
        print(textwrap.fill(f"- {reason}.", 120, subsequent_indent="  "))
    print("\n" + directories())


if __name__ == "__main__":
    main()
