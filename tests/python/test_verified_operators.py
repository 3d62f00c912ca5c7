"""Each comparison of graft(), and of what changes a module, sees an operator that computes something else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torchgraft
from scripts_here import run_here
from test_drawn_verification import _Layer
from test_weight_uses import inputs

pytestmark = pytest.mark.quick


@contextmanager
def _wrong_lora(is_wrong: Callable[..., bool]) -> Iterator[None]:
    """LoRAs are half as large again where `is_wrong` (bank of B, adapter_ids, the active adapter) says so."""
    library = torch.library.Library("torchgraft", "IMPL")

    def gated_lora(
        x: Tensor,
        base: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: Tensor,
        gate_weight: Tensor | None = None,
        gate_bias: Tensor | None = None,
        adapter_ids: Tensor | None = None,
        adapter: int = 0,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        factor = 1.5 if is_wrong(lora_b, adapter_ids, adapter) else 1.0
        gates = gate_weight, gate_bias, adapter_ids, adapter, token_mask
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.torchgraft.gated_lora(x, base, lora_a, lora_b, scaling * factor, *gates)

    library.impl("gated_lora", gated_lora, "AutogradCPU")
    try:
        yield
    finally:
        library._destroy()


def _graft(base: torch.jit.ScriptModule, name: str, **options: object) -> torch.jit.ScriptModule:
    return torchgraft.graft(base, "lora[r=4]", name, fuse=False, **options)


@pytest.fixture(scope="module")
def base() -> torch.jit.ScriptModule:
    torch.manual_seed(0)
    return torch.jit.trace(_Layer().double().eval(), inputs())


@pytest.fixture
def module(base: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Two adapters, of which the first is trained."""
    module = _graft(base, "trained")
    for name, tensor in module.state_dict().items():
        if name.endswith("lora_b"):
            tensor.normal_()
    return _graft(module, "fresh")


def test_graft_compares_operators_with_aten_calls(base: torch.jit.ScriptModule) -> None:
    with (
        _wrong_lora(lambda lora_b, ids, active: True),
        pytest.raises(torchgraft.GraftError, match=r"^graft: .* 'task' by ATen calls differs from its operators'"),
    ):
        _graft(base, "task")
    _graft(base, "task")


def test_graft_compares_adapters_with_their_ids(base: torch.jit.ScriptModule) -> None:
    with (
        _wrong_lora(lambda lora_b, ids, active: ids is not None),
        pytest.raises(
            torchgraft.GraftError,
            match=r"^graft: .* 'task' by adapter_ids differs from the active .* GraftOptions::verify = false\) grafts",
        ),
    ):
        _graft(base, "task")


def test_graft_compares_rows_of_earlier_adapters(module: torch.jit.ScriptModule) -> None:
    with (
        _wrong_lora(lambda lora_b, ids, active: lora_b.shape[0] == 3),
        pytest.raises(torchgraft.GraftError, match=r"^graft: .* rows of the adapters that .* already differs from bef"),
    ):
        _graft(module, "third")


_CHANGES = {
    "merge_adapter": lambda module: torchgraft.merge_adapter(module, "trained", into_base=True),
    "average_adapter": lambda module: torchgraft.average_adapter(module, "mean", {"trained": 0.5, "fresh": 0.5}),
    "verify": torchgraft.verify,
}


@pytest.mark.parametrize("name", _CHANGES)
def test_errors_name_the_function_that_was_called(name: str, module: torch.jit.ScriptModule) -> None:
    with (
        _wrong_lora(lambda lora_b, ids, active: ids is not None),
        pytest.raises(torchgraft.GraftError, match=f"^{name}: .* by adapter_ids differs from") as error,
    ):
        _CHANGES[name](module)
    assert ("VerifyOptions::verify = false" in str(error.value)) == (name != "verify")
    assert "GraftOptions" not in str(error.value)


def test_the_module_that_is_returned_is_compared_where_a_copy_is_drawn(module: torch.jit.ScriptModule) -> None:
    """The error is in the module with the fresh adapter's zeros alone; no copy with drawn weights has them."""
    with (
        _wrong_lora(lambda lora_b, ids, active: lora_b.shape[0] == 3 and not lora_b[1].any()),
        pytest.raises(torchgraft.GraftError, match="^average_adapter: .* the result of 'trained' is another"),
    ):
        torchgraft.average_adapter(module, "mean", {"trained": 0.5, "fresh": 0.5})


_OF_SEVERAL = {
    "merge_adapter": lambda module: torchgraft.merge_adapter(module, "trained", into_base=True),
    "unmerge_adapter": lambda module: torchgraft.unmerge_adapter(module, "trained"),
    "average_adapter": lambda module: torchgraft.average_adapter(module, "mean", {"trained": 0.5, "fresh": 0.5}),
    "lower": torchgraft.lower,
    "verify": torchgraft.verify,
}


@pytest.mark.parametrize("name", _OF_SEVERAL)
def test_each_adapter_of_several_is_compared(name: str, module: torch.jit.ScriptModule) -> None:
    """The second one, which is fresh, is wrong; the change is about the first one, or about none."""
    if name == "unmerge_adapter":
        module = torchgraft.merge_adapter(module, "trained", into_base=True)
    with (
        _wrong_lora(lambda lora_b, ids, active: ids is None and active == 1),
        pytest.raises(torchgraft.GraftError, match=f"^{name}: .* 'fresh'"),
    ):
        _OF_SEVERAL[name](module)
    _OF_SEVERAL[name](module)


@pytest.mark.parametrize("command", ["merge", "unmerge", "lower", "verify"])
def test_a_difference_in_one_of_several_adapters_writes_nothing(
    command: str, module: torch.jit.ScriptModule, tmp_path: Path
) -> None:
    if command == "unmerge":
        module = torchgraft.merge_adapter(module, "trained", into_base=True)
    module.save(str(tmp_path / "model.pt"))
    out = tmp_path / "out.pt"
    more = {"merge": ["trained", "--into-base"], "unmerge": ["trained"]}.get(command, [])
    written = [] if command == "verify" else ["-o", out]
    words = [command, tmp_path / "model.pt", *more, *written]
    with _wrong_lora(lambda lora_b, ids, active: ids is None and active == 1):
        done = run_here("graft.py", *words)
    assert done.returncode == 1 and "'fresh'" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not out.exists()
    assert run_here("graft.py", *words).returncode == 0


@pytest.mark.parametrize("config", ["lora[r=4, alpha=100000]", "lora[r=4, alpha=100000, use_gating=True]"])
def test_a_large_scaling_of_a_fresh_adapter_is_no_error(config: str) -> None:
    half = torch.jit.trace(_Layer().half().eval(), inputs().half())
    module = torchgraft.graft(half, config, "task")
    assert torchgraft.verify(module) == []
    torchgraft.lower(module)
