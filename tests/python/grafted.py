"""Bases and grafted models that many tests use, made once a session."""

import functools
import io

import pytest
import torch

import torchgraft
from models import VARIANTS, Variant, build
from oracle import Saved, oracle_for
from torchgraft._libraries import patcher

# One base of each way of writing attention.
EVERY_WAY = ["bert_sdpa", "bert_eager", "own_pre_sdpa_bool", "encoder_fast_post_nested", "encoder_slow_pre_seq_first"]


@functools.cache
def base(name: str, dtype: torch.dtype) -> torch.jit.ScriptModule:
    """The TorchScript module of a variant, in eval mode."""
    return build(name, dtype)


def saved_adapter(variant: Variant, dtype: torch.dtype, config: str, seed: int = 0) -> Saved:
    """The oracle's randomised adapter for a variant's weights."""
    return oracle_for(variant, dtype).adapter(config, seed)


@functools.cache
def grafted(name: str, dtype: torch.dtype, config: str, gate_pooling: str = "all") -> torch.jit.ScriptModule:
    """The variant with the oracle's adapter under the name "task". Do not change it.

    Verified are BERT with each method and every base with a union of methods, in float32: to verify takes half of a
    graft's time, and whoever asks for the model compares its results.
    """
    saved = saved_adapter(VARIANTS[name], dtype, config)
    verify = dtype == torch.float32 and (name == "bert_sdpa" or config in ("unipelt", "mam", "union_everything"))
    adapters = {"task": saved.directory}
    return torchgraft.graft(base(name, dtype), adapters=adapters, gate_pooling=gate_pooling, verify=verify)


def canonicalised(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """The module as the patcher sees it, with nothing grafted."""
    return torch.jit._recursive.wrap_cpp_module(patcher().canonical_module(module._c))


def check_refused(module: torch.jit.ScriptModule, messages: dict[str, str]) -> None:
    """No configuration of `messages` can be grafted; the error holds the message."""
    for config, message in messages.items():
        with pytest.raises(torchgraft.GraftError) as error:
            torchgraft.graft(module, config, "task")
        assert message in str(error.value), config


def reloaded(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """The module, saved and loaded."""
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)
