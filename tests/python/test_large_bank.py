"""Many adapters in one bank, and changing the bank beside running requests."""

import threading

import pytest
import torch
import transformers

import torchgraft
from grafted import base
from models import VARIANTS, make_batch
from torchgraft._libraries import patcher
from torchgraft.configs import config_to_json

NAME = "bert_sdpa"


def _config(index: int) -> str:
    """Different methods, ranks, prefix lengths and sizes, gated and not."""
    r, length, factor = 1 + index % 5, 1 + index % 7, 2 + index % 6
    return [
        f"prefix_tuning[prefix_length={length}, bottleneck_size=4, use_gating=True]|seq_bn[reduction_factor={factor}, "
        f"use_gating=True]|lora[r={r}, use_gating=True]",
        f"prefix_tuning[prefix_length={length}, flat=True]|par_bn[reduction_factor={factor}]",
        f"lora[r={r}, attn_matrices=['q', 'k', 'v'], intermediate_lora=True]",
        f"double_seq_bn[reduction_factor={factor}]",
        f"prefix_tuning[prefix_length={length}, flat=True, use_gating=True, shared_gating=False]",
    ][index % 5]


def _randomised(module: torch.jit.ScriptModule, seed: int) -> torch.jit.ScriptModule:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.adapters.parameters():
            if parameter.is_floating_point() and parameter.dim() > 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return module


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list:
    """25 adapters, each grafted alone, and its directory."""
    folder = tmp_path_factory.mktemp("bank")
    result = []
    for index in range(25):
        module = _randomised(torchgraft.graft(base(NAME, torch.float64), _config(index), f"a{index}"), index)
        torchgraft.save_adapter(module, f"a{index}", folder / str(index))
        result.append((module, folder / str(index)))
    return result


def _run(module: torch.jit.ScriptModule, seed: int, ids: torch.Tensor | None = None, row: int | None = None):
    variant = VARIANTS[NAME]
    batch = make_batch([9] * 6, 9, torch.float64, seed)
    arguments = variant.arguments(batch)
    if row is not None:
        arguments = tuple(argument[row : row + 1] for argument in arguments)
    chosen = {} if ids is None else {"adapter_ids": ids}  # a base takes none
    with torch.no_grad():
        return variant.hidden(module(*arguments, **chosen))


def test_each_row_of_a_mixed_batch_equals_its_adapter_alone(alone) -> None:
    bank = torchgraft.graft(base(NAME, torch.float64), adapters={f"a{i}": path for i, (_, path) in enumerate(alone)})
    generator = torch.Generator().manual_seed(1)
    for seed in range(8):
        ids = torch.randint(-1, len(alone), (6,), generator=generator)
        mixed = _run(bank, seed, ids)
        for row, index in enumerate(ids.tolist()):
            expected = _run(alone[index][0] if index >= 0 else base(NAME, torch.float64), seed, row=row)
            torch.testing.assert_close(mixed[row : row + 1], expected, rtol=0, atol=1e-12)


def test_200_unipelt_adapters(tmp_path) -> None:
    config = (
        "prefix_tuning[prefix_length=2, bottleneck_size=2, use_gating=True]|seq_bn[use_gating=True]|"
        "lora[r=2, use_gating=True]"
    )
    one = torchgraft.graft(base(NAME, torch.float64), config, "one")
    torchgraft.save_adapter(one, "one", tmp_path)
    bank = torchgraft.graft(base(NAME, torch.float64), adapters={f"a{i}": tmp_path for i in range(200)})
    bank = _randomised(bank, 9)
    assert len(bank.adapter_names()) == 200
    ids = torch.tensor([0, 199, -1, 57, 143, 199])
    mixed = _run(bank, 0, ids)
    for row, index in enumerate(ids.tolist()):
        module = base(NAME, torch.float64)
        if index >= 0:
            torchgraft.save_adapter(bank, f"a{index}", tmp_path / str(index))
            module = torchgraft.load_adapter(module, tmp_path / str(index))
        expected = _run(module, 0, row=row)
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=0, atol=1e-12)


def test_200_unipelt_adapters_on_a_model_of_minilms_size() -> None:
    """float32: a row alone and beside 63 others, each with an adapter of its own."""
    sizes = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = transformers.BertModel(transformers.BertConfig(**sizes, return_dict=False)).eval()
    ids = torch.randint(5, 100, (64, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[::3, 11:] = 0
    with torch.no_grad():
        plain = torch.jit.trace(model, (ids, mask), check_trace=False, strict=False)
    specs = [(f"a{index}", config_to_json("unipelt"), None, "", False, None) for index in range(200)]
    bank = torch.jit._recursive.wrap_cpp_module(patcher().graft(plain._c, specs, "all", "", "", False)[0])
    bank = _randomised(bank, 4)
    chosen = torch.randint(-1, 200, (64,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        mixed, _ = bank(ids, mask, adapter_ids=chosen)
        for row in range(64):
            own, _ = bank(ids[row : row + 1], mask[row : row + 1], adapter_ids=chosen[row : row + 1])
            torch.testing.assert_close(mixed[row : row + 1], own, rtol=0, atol=1e-5)


def test_the_bank_changes_beside_running_requests(alone) -> None:
    """A server swaps modules: every request ends, with the result of its adapter."""
    state = {"module": torchgraft.graft(base(NAME, torch.float64), adapters={"a0": alone[0][1]})}
    expected = _run(alone[0][0], 4)
    stop = threading.Event()
    served, wrong = [], []

    def serve() -> None:
        while not stop.is_set():
            module = state["module"]
            result = _run(module, 4, torch.full((6,), module.adapter_names().index("a0")))
            (served if torch.allclose(result, expected, rtol=0, atol=1e-12) else wrong).append(1)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for index in range(1, 6):
            state["module"] = torchgraft.load_adapter(state["module"], alone[index][1])
        for index in range(1, 6):
            state["module"] = torchgraft.remove_adapter(state["module"], f"a{index}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert served and not wrong
    assert state["module"].adapter_names() == ["a0"]
