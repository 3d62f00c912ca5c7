"""Where optimize() leaves linear maps as they are, and what it and others that copy a module refuse."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchgraft
from grafted import base, grafted
from models import VARIANTS, make_batch

OPERATOR = "torchgraft::linear"


class TwoMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Cast(TwoMaps):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if x.size(0) > 1:
                y = torch.relu(y)
            return self.second(y)


class CastFunction(TwoMaps):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.relu(y)
        return self.second(y)


class WithoutGradients(TwoMaps):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.second(torch.relu(self.first(x)))


class OneBias(TwoMaps):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.relu(self.first(x)), self.second.weight, self.bias)


def scripted(kind: type[nn.Module]) -> torch.jit.ScriptModule:
    torch.manual_seed(0)
    return torch.jit.script(kind().eval())


@pytest.mark.quick
@pytest.mark.parametrize(("kind", "maps"), [(Cast, 1), (CastFunction, 2), (WithoutGradients, 2), (OneBias, 1)])
def test_what_the_operator_does_otherwise_is_left(kind: type[nn.Module], maps: int) -> None:
    module = scripted(kind)
    optimized = torchgraft.optimize(module)
    assert str(optimized.graph).count(f"{OPERATOR}(") == maps
    for x in (torch.randn(2, 5, 6), torch.randn(1, 5, 6)):
        wanted, actual = module(x), optimized(x)
        assert actual.dtype == wanted.dtype
        tolerance = 0.02 if wanted.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def after_hook(self, x: tuple[Tensor], out: Tensor) -> Tensor:
    return out * 3.0


def before_hook(self, x: tuple[Tensor]) -> tuple[Tensor]:
    return (x[0] * 3.0,)


@pytest.mark.parametrize("change", ["optimize", "quantize", "linear_maps", "graft"])
@pytest.mark.parametrize("is_inside", [False, True])
@pytest.mark.parametrize("is_after", [False, True])
def test_forward_hooks_are_refused(change: str, is_inside: bool, is_after: bool) -> None:
    model = TwoMaps().eval()
    hooked = model.first if is_inside else model
    hooked.register_forward_hook(after_hook) if is_after else hooked.register_forward_pre_hook(before_hook)
    module = torch.jit.script(model)
    expected = f"the {'submodule first' if is_inside else 'module'} has forward hooks, .* call in its forward"
    with pytest.raises(torchgraft.GraftError, match=expected):
        getattr(torchgraft, change)(module, **({"config": "lora", "name": "task"} if change == "graft" else {}))


@pytest.mark.quick
def test_a_list_that_is_returned_twice_stays_one() -> None:
    class Twice(TwoMaps):
        def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            found = [self.second(torch.relu(self.first(x))), x]
            return found, found

    module = scripted(Twice)
    x = torch.randn(2, 5, 6)
    for change in (torchgraft.optimize, torchgraft.quantize):
        first, second = change(module)(x)
        assert len(first) == len(second) == 2 and all(a is b for a, b in zip(first, second, strict=True))
        torch.testing.assert_close(first, module(x)[0], rtol=0.1, atol=0.1)


def test_an_optimised_bank_is_compared() -> None:
    module = torchgraft.optimize(grafted("own_pre_sdpa_bool", torch.float32, "lora_all"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchgraft.rename_adapter(module, "task", "other")
        torchgraft.merge_adapter(module, "task")
        torchgraft.optimize(module)
        assert torchgraft.verify(module) == []


class Calls(nn.Module):
    """Calls the operator of its own accord, in front of a base."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = base("own_pre_sdpa_bool", torch.float32)
        self.map = nn.Linear(48, 48)
        self.named = "mish"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inside(torch.ops.torchgraft.linear(x, self.map.weight, self.map.bias, "mish"), mask)


class CallsByAttribute(Calls):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inside(torch.ops.torchgraft.linear(x, self.map.weight, self.map.bias, self.named), mask)


def operators(module: torch.jit.ScriptModule) -> int:
    """How often methods of the module and of what it holds call an operator of the library."""
    methods = [each._c._get_method(name) for each in module.modules() for name in each._c._method_names()]
    return sum(str(method.graph).count(" torchgraft::") for method in methods)


def test_a_base_that_calls_the_operator_itself_is_lowered() -> None:
    module = torchgraft.graft(torch.jit.script(Calls().eval()), config="lora", name="task")
    batch = VARIANTS["own_pre_sdpa_bool"].arguments(make_batch([9, 5], 9, torch.float32))
    lowered = torchgraft.lower(module)
    assert operators(module) > 0 and operators(lowered) == 0
    torch.testing.assert_close(lowered(*batch), module(*batch), rtol=1e-4, atol=1e-5)


def test_a_function_that_is_named_at_run_time_cannot_be_lowered() -> None:
    module = torchgraft.graft(torch.jit.script(CallsByAttribute().eval()), config="lora", name="task")
    with pytest.raises(torchgraft.GraftError, match="lower: .* calls torchgraft::linear .* call PyTorch's functions"):
        torchgraft.lower(module)


def test_a_sparse_input_is_refused_by_name() -> None:
    module = torchgraft.optimize(scripted(TwoMaps))
    with pytest.raises(RuntimeError, match="linear: expected x to be a dense tensor"):
        module(torch.randn(5, 6).to_sparse())


class Masked(nn.Module):
    """Attention with masked_fill of a fill of its own."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.fill = fill
        self.query, self.key, self.value, self.output = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        query = self.query(x).view(rows, tokens, 4, 8).transpose(1, 2)
        key = self.key(x).view(rows, tokens, 4, 8).transpose(1, 2)
        value = self.value(x).view(rows, tokens, 4, 8).transpose(1, 2)
        scores = (query @ key.transpose(-1, -2) / 2.8).masked_fill(hidden[:, None], self.fill)
        return x + self.output((torch.softmax(scores, -1) @ value).transpose(1, 2).reshape(rows, tokens, 32))


@pytest.mark.parametrize("fill", [-1e4, -float("inf")])
def test_a_query_that_sees_no_key_gives_what_it_gave(fill: float) -> None:
    """A causal mask and padding on the left: the first query of a row has nothing to attend to."""
    torch.manual_seed(0)
    module = torch.jit.script(Masked(fill).eval())
    hidden = torch.ones(5, 5).triu(1).bool().repeat(2, 1, 1)
    hidden[1, :, :2] = True
    x = 3 * torch.randn(2, 5, 32)
    optimised = torchgraft.optimize(module, example=(x, hidden))
    assert operators(optimised) == 4
    with torch.no_grad():
        torch.testing.assert_close(optimised(x, hidden), module(x, hidden), equal_nan=True)
