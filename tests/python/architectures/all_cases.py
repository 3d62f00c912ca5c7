"""Every case there is, and how far two correct results of it may be apart."""

import functools

import torch

import hugging_face_cases
import own_cases
import restated_cases
import torch_cases
from case import METHODS, Case
from oracle import TOLERANCE

CASES: dict[str, Case] = {
    **hugging_face_cases.CASES,
    **restated_cases.CASES,
    **torch_cases.CASES,
    **own_cases.CASES,
}

# (name, form); the first form of a case is the one that most people export.
FORMS: list[tuple[str, str]] = [(name, form) for name, case in CASES.items() for form in case.forms]

# One of each kind, for scripts/test quick: post-norm, pre-norm, a decoder, one that feeds another, shared layers, a
# packed projection, torch.nn's layers as one operator and scripted, two towers.
QUICK = {
    ("bert_sdpa", "traced"),
    ("vit_eager", "traced"),
    ("llama_sdpa", "traced"),
    ("bart_eager", "traced"),
    ("albert_sdpa", "traced"),
    ("gpt2_sdpa", "traced"),
    ("deberta_v2_shared_eager", "traced"),
    ("modernbert_sdpa", "traced"),
    ("own_einsum", "scripted"),
    ("own_siamese", "scripted"),
    ("torch_encoder_post_padding", "fused"),
    ("torch_encoder_post_padding", "scripted"),
}

# Whatever the model's dtype, these compute something in float32: their float64 results agree to its rounding only.
_COMPUTES_IN_FLOAT32 = {
    ("deberta_eager", "traced"): "its own layer norm",
    ("vit_eager", "traced"): "softmax",
    ("clip_vision_eager", "traced"): "softmax",
    ("gpt2_eager", "traced"): "traced, the square root of the head width",
    ("gptj_eager", "traced"): "queries, keys and scores",
    ("llama_sdpa", "traced"): "RMSNorm and rotary angles",
    ("llama_eager", "traced"): "RMSNorm, rotary angles and softmax",
    ("mistral_sdpa", "traced"): "RMSNorm and rotary angles",
    ("mistral_eager", "traced"): "RMSNorm, rotary angles and softmax",
    ("qwen2_sdpa", "traced"): "RMSNorm and rotary angles",
    ("qwen2_eager", "traced"): "RMSNorm, rotary angles and softmax",
    ("t5_eager", "traced"): "softmax and the norms' variance",
    ("t5_gated_eager", "traced"): "softmax and the norms' variance",
    ("own_einsum", "traced"): "traced, the square root of the head width",
    ("own_einsum_pre", "traced"): "traced, the square root of the head width",
}
# CLIP's text model writes float64's lowest number into a float32 mask, and stops.
_FLOAT32_ONLY = {"clip_text_sdpa", "clip_text_eager"}

# What is known not to work yet when frozen, and why. Strict: a case that begins to pass must leave the list.
FROZEN_NOT_YET = {
    ("deberta_v2_shared_eager", "traced"): "freezing computes the projected relative positions once and for all, "
    "where no LoRA reaches them"
}
# The same of what torch.jit.optimize_for_inference makes of it.
OPTIMIZED_NOT_YET = FROZEN_NOT_YET | {
    (name, "scripted"): "optimize_for_inference packs the weights of the same layers anew in each of two branches, so "
    "that the layers are others there"
    for name in ("timm_vit_explicit", "timm_vit_qk_norm_layer_scale_explicit")
}


def is_second_spelling(name: str) -> bool:
    """Whether the same model is there with torch's fused attention, too. Checks that hold of what surrounds attention
    are slow for the second."""
    return name.endswith("_eager") and f"{name.removesuffix('_eager')}_sdpa" in CASES


@functools.cache
def base(name: str, form: str, dtype: torch.dtype) -> torch.jit.ScriptModule:
    """The case's model as TorchScript, made once a process. Never modify it."""
    return CASES[name].to_script(form, dtype)


def methods(name: str) -> list[str]:
    """Those that the model has locations for."""
    return [method for method in METHODS if method not in CASES[name].without]


def dtypes(name: str) -> tuple[torch.dtype, ...]:
    """Those in which the case's own model runs."""
    return (torch.float32,) if name in _FLOAT32_ONLY else (torch.float32, torch.float64)


def tolerance(name: str, form: str, dtype: torch.dtype) -> float:
    """How far two correct results of the case may be apart."""
    if name.startswith("t5") and dtype == torch.float32:
        return 2e-5  # T5 does not scale its scores: what products round by is larger there, in the oracle too
    return TOLERANCE[torch.float32 if (name, form) in _COMPUTES_IN_FLOAT32 else dtype]
