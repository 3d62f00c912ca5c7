"""A LoRA on every projection of a model, merged into its weights, however the model stores them."""

import pytest
import torch

import torchgraft
from hugging_face_cases import CASES
from oracle import difference

# Transposed weights (GPT-2), shared layers (ALBERT), weights that are applied to relative positions too (DeBERTa).
_NAMES = [name for name, case in CASES.items() if "lora_all" not in case.without and name.rpartition("_")[2] != "sdpa"]
# Their norms or softmaxes round to float32.
_ROUNDED = ("llama", "mistral", "t5", "clip", "deberta", "vit")


@pytest.mark.parametrize("name", _NAMES)
def test_the_merged_model_is_the_grafted_one(name: str) -> None:
    case = CASES[name]
    dtype = torch.float32 if name.startswith("clip_text") else torch.float64  # its mask does not trace in float64
    base = case.to_script("traced", dtype)
    grafted = case.reference.graft(base, ["lora_all"], dtype)
    merged = torchgraft.ungraft(torchgraft.merge_adapter(grafted, "lora_all"))
    arguments = case.arguments(dtype, 1)
    tolerance = 1e-5 if name.startswith(_ROUNDED) else 1e-11
    with torch.no_grad():
        plain, expected, actual = (case.hidden(module(*arguments)) for module in (base, grafted, merged))
    assert difference(plain, expected) > 1e-3
    assert difference(actual, expected) <= tolerance
