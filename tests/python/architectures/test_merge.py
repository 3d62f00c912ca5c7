"""A LoRA on every projection of a model, merged into its weights, however the model stores them."""

import pytest
import torch

import own_cases
import restated_cases
import torch_cases
import torchgraft
from all_cases import is_second_spelling
from case import Case
from hugging_face_cases import CASES
from oracle import difference
from thinned import thinned

# Transposed weights (GPT-2), shared layers (ALBERT), weights that are applied to relative positions too (DeBERTa).
_NAMES = [name for name, case in CASES.items() if "lora_all" not in case.without and name.rpartition("_")[2] != "sdpa"]
# Their norms or softmaxes round to float32.
_ROUNDED = ("gptj", "llama", "mistral", "t5", "clip", "deberta", "vit")


@pytest.mark.parametrize("name", _NAMES)
def test_the_merged_model_is_the_grafted_one(name: str) -> None:
    case = CASES[name]
    dtype = torch.float32 if name.startswith("clip_text") else torch.float64  # its mask does not trace in float64
    base = case.to_script("traced", dtype)
    # Here and below: to merge is verified; test_architectures.py verifies to graft.
    grafted = case.reference.graft(base, ["lora_all"], dtype, verify=False)
    merged = torchgraft.ungraft(torchgraft.merge_adapter(grafted, "lora_all"))
    arguments = case.arguments(dtype, 1)
    tolerance = 1e-5 if name.startswith(_ROUNDED) else 1e-11
    with torch.no_grad():
        plain, expected, actual = (case.hidden(module(*arguments)) for module in (base, grafted, merged))
    assert difference(plain, expected) > 1e-3
    assert difference(actual, expected) <= tolerance


_OTHERS: dict[str, Case] = {**own_cases.CASES, **restated_cases.CASES, **torch_cases.CASES}


@pytest.mark.parametrize(
    ("name", "form"),
    thinned(
        [(name, form) for name, case in _OTHERS.items() for form in case.forms],
        lambda each: not is_second_spelling(each[0]),
    ),
)
def test_where_the_library_does_not_know_the_model(name: str, form: str) -> None:
    """Packed projections that torch.nn splits by the width of an input, two towers, layers in loops."""
    case = _OTHERS[name]
    base = case.to_script(form, torch.float64)
    config = "lora[r=4, attn_matrices=['q', 'k', 'v'], intermediate_lora=True, output_lora=True]"
    grafted = torchgraft.graft(base, config, "task", verify=False)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in grafted.adapters.named_parameters():
        if key.endswith((".lora_a", ".lora_b")):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 8
    if name in ("own_einsum", "own_einsum_pre"):
        with pytest.raises(torchgraft.GraftError, match="is stored with 3 dimensions; only matrices can be merged"):
            torchgraft.merge_adapter(grafted, "task")
        return
    merged = torchgraft.merge_adapter(grafted, "task")
    arguments = case.arguments(torch.float64, 1)
    with torch.no_grad():
        plain, expected, actual = (case.hidden(module(*arguments)) for module in (base, grafted, merged))
    seen = ~plain.isnan()  # ModernBERT has NaN where a row of padding sees nothing; fused attention has zeros
    assert difference(plain[seen], expected[seen]) > 1e-3
    assert difference(actual[seen], expected[seen]) <= 1e-6  # some compute parts in float32
