"""Changes of a module are compared with the module as it was, on inputs; so are the parts of a file that must agree."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import torchgraft
from scripts_here import run_here
from test_weight_uses import UsedAfterwards, attend, inputs, module_of, saved_and_loaded, with_lora


@pytest.fixture(scope="module")
def bank() -> torch.jit.ScriptModule:
    """The LoRA "task" and a gated one, "other", both with drawn weights; "other" is active."""
    module = torchgraft.graft(with_lora(module_of(UsedAfterwards, "scripted")), "lora[r=4, use_gating=True]", "other")
    generator = torch.Generator().manual_seed(2)
    for key, parameter in module.adapters.named_parameters():
        if key.endswith((".lora_a", ".lora_b")):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
    return module


def _called_merged(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A copy whose first adapter claims to be merged, and is not."""
    copy = saved_and_loaded(module)
    copy.adapters.merged = [True] + [False] * (len(copy.adapter_names()) - 1)
    return copy


def test_the_parts_of_a_bank_agree(bank: torch.jit.ScriptModule) -> None:
    for module in (bank, torchgraft.merge_adapter(bank, "task", into_base=True, example=inputs())):
        assert torchgraft.verify(module) == torchgraft.verify(saved_and_loaded(module), inputs()) == []


def test_a_file_whose_parts_differ_is_named(bank: torch.jit.ScriptModule) -> None:
    module = _called_merged(bank)
    with pytest.raises(torchgraft.GraftError, match="verify: .* 'task', which is merged, is another than it must be"):
        torchgraft.verify(module)
    with pytest.raises(torchgraft.GraftError, match="unmerge_adapter: on example inputs .* Nothing was changed"):
        torchgraft.unmerge_adapter(module, "task", example=inputs())
    torchgraft.unmerge_adapter(module, "task", verify=False)


def test_inputs_on_which_the_module_fails_are_refused(bank: torch.jit.ScriptModule) -> None:
    for change in (torchgraft.lower, torchgraft.ungraft, torchgraft.verify):
        with pytest.raises(torchgraft.GraftError, match="fails on the example inputs"):
            change(bank, example=torch.zeros(2, 3, dtype=torch.int64))


class Noisy(UsedAfterwards):
    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x)
        return self.out(attend(self.q(x), self.k(x), v)) + torch.rand_like(x) * 1e-9


def test_what_is_not_compared_is_said() -> None:
    with pytest.warns(UserWarning, match="not compared with the base's: its forward draws random numbers"):
        grafted = with_lora(module_of(Noisy, "scripted"))
    assert "its forward draws random numbers" in torchgraft.verify(grafted)[0]
    for change in (torchgraft.lower, torchgraft.ungraft):
        with pytest.warns(
            UserWarning, match="not compared with the module as it was: its forward draws random numbers"
        ):
            change(grafted)
    with pytest.warns(UserWarning, match="merge_adapter: the result was not compared"):
        torchgraft.merge_adapter(grafted, "task")


def test_the_command_says_what_agrees(bank: torch.jit.ScriptModule, tmp_path: Path) -> None:
    good, bad, example, out = (tmp_path / name for name in ("good.pt", "bad.pt", "example.pt", "out.pt"))
    bank.save(str(good))
    _called_merged(bank).save(str(bad))
    torch.save(inputs(), example)
    done = run_here("graft.py", "verify", good, "--example", example)
    assert done.returncode == 0 and "adapters task, other give the results that they must" in done.stdout
    done = run_here("graft.py", "verify", bad)
    assert done.returncode == 1 and "'task', which is merged, is another than it must be" in done.stderr
    done = run_here("graft.py", "unmerge", bad, "task", "-o", out, "--example", example)
    assert done.returncode == 1 and "Nothing was changed" in done.stderr and not out.exists()
    done = run_here("graft.py", "merge", good, "task", "-o", out, "--into-base", "--example", example)
    assert done.returncode == 0 and run_here("graft.py", "verify", out).returncode == 0, done.stderr
