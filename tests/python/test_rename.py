"""Bases that call something as grafting does: the base's gets another name, which the user gives."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from scripts_here import run_here
from test_weight_uses import HIDDEN, attend, inputs, saved_and_loaded


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(attend(self.q(x), self.k(x), self.v(x)))


class _Taken(nn.Module):
    """Has an argument, an attribute that holds the layers, a number and methods of grafting's names."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.Sequential(_Layer(), _Layer())
        self.active_adapter: int = 2

    @torch.jit.export
    def activate(self, x: Tensor) -> Tensor:
        return self.forward(x, None) * self.active_adapter

    def forward(self, x: Tensor, adapter_ids: Tensor | None = None) -> Tensor:
        if adapter_ids is not None:
            x = x + adapter_ids.view(-1, 1, 1)
        return self.adapters(x)


NAMES = {"adapters": "layers", "adapter_ids": "shift", "activate": "doubled", "active_adapter": "factor"}


@pytest.fixture(scope="module")
def base() -> torch.jit.ScriptModule:
    torch.manual_seed(0)
    return torch.jit.script(_Taken().double().eval())


def _check(module: torch.jit.ScriptModule, base: torch.jit.ScriptModule) -> None:
    x, shift = inputs(), torch.tensor([1, 3])
    with torch.no_grad():
        module.deactivate()
        assert torch.equal(module(x, shift), base(x, shift)) and torch.equal(module(x, shift=shift), base(x, shift))
        assert torch.equal(module.doubled(x), base.activate(x)) and module.factor == 2
        for name in module.adapter_names():
            module.activate(name)
            expected = module(x, shift)
            assert not torch.equal(expected, base(x, shift))
            ids = torch.tensor([module.adapter_names().index(name), -1])
            rows = module(x, shift, adapter_ids=ids)
            torch.testing.assert_close(rows, torch.stack([expected[0], base(x, shift)[1]]))


def test_every_function_finds_what_grafting_added(base: torch.jit.ScriptModule, tmp_path: Path) -> None:
    module = torchgraft.graft(base, "prefix_tuning[prefix_length=3]", "first", rename=NAMES, example=inputs())
    module = saved_and_loaded(module)
    _check(module, base)
    module = torchgraft.graft(module, "lora[r=2]", "second", example=inputs())  # remembers the names
    assert getattr(module.layers, "0").q.weight.shape == (HIDDEN, HIDDEN)
    for key, parameter in module.adapters.named_parameters():
        if key.endswith("lora_b"):
            parameter.data.normal_()
    _check(module, base)
    assert torchgraft.verify(module, inputs()) == []
    _check(torchgraft.lower(module, example=inputs()), base)
    torchgraft.save_adapter(module, "second", tmp_path)
    _check(torchgraft.load_adapter(torchgraft.remove_adapter(module, "second"), tmp_path), base)
    pool = torchgraft.AdapterPool(module, capacity=4)
    pool.insert("third", tmp_path)
    x = inputs()
    with pool.acquire(["third", ""]) as lease, torch.no_grad():
        module.activate("second")
        expected = torch.stack([module(x)[0], base(x)[1]])
        torch.testing.assert_close(lease.module(x, adapter_ids=lease.ids), expected)
    again = torchgraft.ungraft(module, example=inputs())
    assert {name for name, _ in again.named_children()} == {"adapters"} and again.active_adapter == 2
    assert [argument.name for argument in again.forward.schema.arguments] == ["self", "x", "adapter_ids"]
    with torch.no_grad():
        assert torch.equal(again(x, adapter_ids=torch.tensor([1, 3])), base(x, torch.tensor([1, 3])))
        assert torch.equal(again.activate(x), base.activate(x))


class _Required(_Taken):
    def forward(self, x: Tensor, adapter_ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.adapters(x + adapter_ids.view(-1, 1, 1))

    @torch.jit.export
    def activate(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("by_name", [False, True])
def test_an_example_has_the_base_s_own_argument(by_name: bool) -> None:
    own = torch.jit.script(_Required().double().eval())
    values = (inputs(), torch.tensor([1, 3]))
    example = dict(zip(("x", "adapter_ids"), values, strict=True)) if by_name else values
    grafted = torchgraft.graft(own, "lora", "a", rename=NAMES, example=example)
    torch.testing.assert_close(grafted(*values), own(*values))


def test_without_names_such_a_base_is_refused(base: torch.jit.ScriptModule) -> None:
    names = dict(NAMES)
    while names:
        with pytest.raises(torchgraft.GraftError, match=r"of its own.*rename=|already has .*rename=") as error:
            torchgraft.graft(base, "lora", "task", rename={old: NAMES[old] for old in NAMES.keys() - names.keys()})
        named = [old for old in names if f"'{old}'" in str(error.value)]
        assert named
        del names[named[0]]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({**NAMES, "missing": "x1"}, "no attribute, method or argument of forward 'missing'"),
        ({**NAMES, "adapters": "x"}, "'x', the new name of 'adapters', is taken"),
        ({**NAMES, "adapters": "1st"}, "'1st', the new name of 'adapters', is no name that TorchScript keeps"),
        ({**NAMES, "adapters": "class"}, "'class', the new name of 'adapters', is no name that TorchScript keeps"),
        ({**NAMES, "adapter_ids": "if"}, "'if', the new name of 'adapter_ids', is no name that TorchScript keeps"),
        ({**NAMES, "activate": "Ellipsis"}, "'Ellipsis', the new name of 'activate', is no name that Torch"),
        ({**NAMES, "adapter_ids": "inf"}, "'inf', the new name of 'adapter_ids', is no name that TorchScript keeps"),
        ({**NAMES, "forward": "first"}, "'forward' that can get another name"),
        ({**NAMES, "adapters": "base_forward"}, "'base_forward', which grafting adds"),
    ],
)
def test_wrong_names_are_refused(base: torch.jit.ScriptModule, rename: dict[str, str], message: str) -> None:
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.graft(base, "lora", "task", rename=rename)


def test_names_are_chosen_once(base: torch.jit.ScriptModule) -> None:
    module = torchgraft.graft(base, "lora", "task", rename=NAMES)
    with pytest.raises(torchgraft.GraftError, match="names of the base were chosen when the module was grafted first"):
        torchgraft.graft(module, "lora", "more", rename={"q": "p"})


def test_the_command_takes_names(base: torch.jit.ScriptModule, tmp_path: Path) -> None:
    base.save(str(tmp_path / "base.pt"))
    grafting = ("--config", "prefix_tuning", "--name", "task")
    done = run_here("graft.py", "add", tmp_path / "base.pt", "-o", tmp_path / "out.pt", *grafting)
    assert done.returncode == 1 and "--rename adapters=base_adapters" in done.stderr
    names = [part for old, new in NAMES.items() for part in ("--rename", f"{old}={new}")]
    done = run_here("graft.py", "add", tmp_path / "base.pt", "-o", tmp_path / "out.pt", *grafting, *names)
    assert done.returncode == 0, done.stderr
    _check(torch.jit.load(str(tmp_path / "out.pt")), base)
    done = run_here("graft.py", "ungraft", tmp_path / "out.pt", "-o", tmp_path / "again.pt")
    assert done.returncode == 0 and hasattr(torch.jit.load(str(tmp_path / "again.pt")), "activate")


class _Named(nn.Module):
    """A base with a method of a name that a grafted module has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = _Layer()

    @torch.jit.export
    def adapter_names(self) -> int:
        return 7

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_base_with_one_of_our_names_is_no_grafted_module() -> None:
    base = torch.jit.script(_Named().double().eval())
    x = inputs()
    with torch.no_grad():
        torch.testing.assert_close(torchgraft.optimize(base)(x), base(x))
        grafted = torchgraft.graft(base, "lora", "task", rename={"adapter_names": "names_of_base"})
        again = torchgraft.ungraft(grafted)
        assert again.adapter_names() == 7 and torch.equal(again(x), base(x))


def test_a_quantised_module_keeps_the_names_of_what_is_left() -> None:
    """forward alone is quantised: the exported method goes, and a warning names it."""
    base = torch.jit.script(_Taken().eval())
    grafted = torchgraft.graft(base, "lora", "task", rename=NAMES)
    with pytest.warns(UserWarning, match="forward only, without activate"):
        made = saved_and_loaded(torchgraft.quantize(grafted))
    x, shift = inputs().float(), torch.tensor([1, 3])
    with torch.no_grad():
        expected, ids = base(x, shift), torch.tensor([0, -1])
        for actual in (made(x, shift=shift), made(x, shift, adapter_ids=ids)):
            assert 0 < (actual - expected).norm() < 0.1 * expected.norm()
        again = torchgraft.ungraft(made)
        assert [argument.name for argument in again.forward.schema.arguments] == ["self", "x", "adapter_ids"]
