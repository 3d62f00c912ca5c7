"""A program whose keys and values stand behind those of earlier passes: the same as the trace of the same decoder."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicCache

import torchgraft

LAYERS = 2


class Step(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: tuple) -> tuple:
        cache = DynamicCache.from_legacy_cache(past)
        logits = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)[0]
        return logits, cache.to_legacy_cache()


def _arguments(rows: int, tokens: int, cached: int) -> tuple:
    past = tuple((torch.randn(rows, 4, cached, 12), torch.randn(rows, 4, cached, 12)) for _ in range(LAYERS))
    positions = torch.arange(cached, cached + tokens)[None].repeat(rows, 1)
    return torch.randint(0, 97, (rows, tokens)), torch.zeros(rows, 1, tokens, cached + tokens), positions, past


def _flat(arguments: tuple) -> list[Tensor]:
    return [*arguments[:3], *(each for pair in arguments[3] for each in pair)]


def _step() -> Step:
    sizes = GPT2Config(n_embd=48, n_head=4, n_layer=LAYERS, vocab_size=97, return_dict=False)
    return Step(GPT2LMHeadModel(sizes).eval())


def _program(model: Step) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO
    past = (({0: auto, 2: auto},) * 2,) * LAYERS
    shapes = ({0: auto, 1: auto}, {0: auto, 2: auto, 3: auto}, {0: auto, 1: auto}, past)
    return torch.export.export(model, _arguments(2, 3, 4), dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize("config", ["lora[r=2]", "prefix_tuning_flat[prefix_length=3]", "seq_bn[reduction_factor=4]"])
def test_a_program_with_a_growing_cache_equals_the_trace(config: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = _step(), _arguments(2, 3, 4)
    program = torchgraft.from_program(_program(model))
    assert [layer["cache"] for layer in torchgraft.inspect(program)["layers"]] == ["growing"] * LAYERS
    traced = torch.jit.trace(model, example, check_trace=False, strict=False)
    written = torchgraft.graft(traced, config, "task", example=example)
    with torch.no_grad():
        for bank in written.adapters.parameters():
            bank.normal_(std=0.2)
    torchgraft.save_adapter(written, "task", tmp_path)
    read = torchgraft.load_adapter(program, tmp_path, "task")
    arguments = _arguments(3, 2, 7)
    with torch.no_grad():
        wanted, past = written(*arguments)
        found = torch.utils._pytree.tree_leaves(read(*_flat(arguments)))
        plain = model(*arguments)[0]
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1:], [each for pair in past for each in pair], atol=1e-5, rtol=1e-5)
    assert (wanted - plain).abs().max() > 1e-3


@pytest.mark.slow(seconds=15)
def test_a_decoder_with_a_cache_runs_in_onnx_runtime(tmp_path: Path) -> None:
    """transformers begins a cache with a tensor of size [0], beside which ONNX can join nothing."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="requirements/onnx.txt is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="requirements/onnx.txt is not installed")
    torch.manual_seed(0)
    program = torchgraft.from_program(_program(_step()))
    module = torchgraft.graft(program, "unipelt", "task")
    with torch.no_grad():
        for bank in module.adapters.parameters():
            if bank.isfinite().all():
                bank.normal_(std=0.2)
    torchgraft.save_onnx(
        torchgraft.export(module, tuple(_flat(_arguments(2, 3, 4))), lowered=True), tmp_path / "step.onnx"
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"])
    for rows, tokens, cached in ((3, 2, 7), (1, 1, 5), (2, 4, 1)):
        inputs = [*_flat(_arguments(rows, tokens, cached)), torch.arange(rows) % 2 - 1]
        names = [given.name for given in session.get_inputs()]
        found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(module(*inputs[:-1], adapter_ids=inputs[-1]))
        torch.testing.assert_close([torch.from_numpy(x) for x in found], expected, atol=1e-5, rtol=1e-5)
