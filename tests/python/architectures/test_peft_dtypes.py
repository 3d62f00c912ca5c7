"""PEFT computes an adapter in float32, whatever the dtype of its file."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import torchgraft
from hugging_face_models import FAMILIES

_OPTIONS = {
    "lora": {},
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True, target_modules=["query"]),
    "lora_bias": dict(lora_bias=True),
}


def _bert() -> torch.nn.Module:
    return FAMILIES["bert"].make("sdpa", torch.float32)


def _save(folder: Path, dtype: torch.dtype, options: dict) -> None:
    """A random adapter whose file is in `dtype`. 16 / 12 is no power of two: rounding shows."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**dict(r=12, lora_alpha=16, target_modules=["query", "value"]) | options)
    tuned = peft.get_peft_model(_bert().model, config)
    with torch.no_grad():
        for path, parameter in tuned.named_parameters():
            if "lora_" in path:
                parameter.normal_(std=0.2).add_(1 if "magnitude" in path else 0)
    tuned.save_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
def test_a_file_in_half_equals_peft(options: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    _save(tmp_path, dtype, options)
    arguments = FAMILIES["bert"].arguments(torch.float32, 0)
    base = torch.jit.trace(_bert(), arguments, check_trace=False, strict=False)
    reference = _bert()
    peft.PeftModel.from_pretrained(reference.model, str(tmp_path)).eval()  # in place
    module = torchgraft.load_adapter(base, tmp_path, "task")
    with torch.no_grad():
        expected = reference(*arguments)
        assert (expected - base(*arguments)).abs().max() > 0.1
        torch.testing.assert_close(module(*arguments), expected, rtol=0, atol=1e-5)
