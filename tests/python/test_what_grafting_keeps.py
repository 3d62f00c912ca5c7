"""What a module has beside its forward: attributes, training mode, exported methods, submodules with adapters."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from odd_layers import HIDDEN, Plain, batch

pytestmark = pytest.mark.quick

NO_ADAPTER = torch.full((3,), -1)


class Scaled(nn.Module):
    scale: float
    label: str | None

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self.shift, self.flips, self.label = Plain(), 1.5, 2, False, None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask) * self.scale + self.shift
        if self.label is not None:
            y = y + 1.0
        return -y if self.flips else y


def _graft(module: nn.Module, **options: object) -> torch.jit.ScriptModule:
    return torchgraft.graft(torch.jit.script(module.eval()), config="lora", name="task", **options)


@pytest.mark.parametrize(("name", "value"), [("scale", 3.0), ("shift", 5), ("flips", True), ("label", "a")])
def test_an_attribute_set_after_grafting_is_an_error_that_names_it(name: str, value: object) -> None:
    grafted = _graft(Scaled())
    grafted(*batch())
    before = getattr(grafted, name)
    setattr(grafted, name, value)
    with pytest.raises(torch.jit.Error, match=f"'{name}' was .* when the adapters were grafted"):
        grafted(*batch(), adapter_ids=NO_ADAPTER)
    grafted.base_forward(*batch())
    setattr(grafted, name, before)
    grafted(*batch())


def test_an_attribute_set_on_the_base_is_followed() -> None:
    base = torch.jit.script(Scaled().eval())
    base.scale = 3.0
    grafted = torchgraft.graft(base, config="lora", name="task")
    assert torch.allclose(grafted(*batch(), adapter_ids=NO_ADAPTER), base(*batch()), atol=1e-5)
    assert torch.allclose(torch.jit.freeze(grafted)(*batch()), grafted(*batch()), atol=1e-5)


def test_a_text_that_becomes_none_after_grafting_is_an_error_that_names_it() -> None:
    model = Scaled()
    model.label = "a"
    grafted = _graft(model)
    grafted(*batch())
    grafted.label = None
    with pytest.raises(torch.jit.Error, match="'label' was a when the adapters were grafted"):
        grafted(*batch())


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Plain(), Plain()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not self.training or float(torch.rand(1)) > 0.5:
            x = self.first(x, mask)
        if not self.training or float(torch.rand(1)) > 0.5:
            x = self.second(x, mask)
        return x


def test_layers_that_training_drops_are_grafted_in_eval_mode() -> None:
    model = LayerDrop().eval()
    grafted = _graft(model)
    assert len(torchgraft.inspect(grafted)["layers"]) == 2
    assert torch.allclose(grafted(*batch(), adapter_ids=NO_ADAPTER), model(*batch()), atol=1e-5)
    grafted.train()
    with pytest.raises(torch.jit.Error, match="'training' was False when the adapters were grafted"):
        grafted(*batch())


class Exports(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Plain()

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.pool(self.layer(x, mask))

    @torch.jit.export
    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x, mask)


def test_methods_that_keep_the_base_s_results_are_named() -> None:
    with pytest.warns(UserWarning, match="what else the module exports keeps the base's results: encode$"):
        _graft(Exports())


class Wraps(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x, mask)


def test_a_submodule_with_adapters_is_named() -> None:
    outer = torch.jit.script(Wraps(_graft(Scaled())).eval())
    with pytest.raises(torchgraft.GraftError, match="the submodule inner has adapters"):
        torchgraft.graft(outer, config="lora", name="task")
    with pytest.raises(torchgraft.GraftError, match="no adapters, but its submodule inner has"):
        torchgraft.ungraft(outer)


class Repeats(Plain):
    """Two heads of keys and values, each for two heads of queries."""

    def __init__(self) -> None:
        super().__init__(kv_heads=2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        keys = self.heads(self.key(x)).repeat_interleave(2, dim=1)
        values = self.heads(self.value(x)).repeat_interleave(2, 1)
        return self.finish(x, self.attend(self.heads(self.query(x)), keys, values, mask))


@pytest.mark.parametrize("form", ["script", "trace"])
@pytest.mark.parametrize("config", ["lora[attn_matrices=['q','k','v']]", "prefix_tuning"])
def test_heads_that_repeat_interleave_repeats_are_grouped_heads(form: str, config: str) -> None:
    model = Repeats().eval()
    base = torch.jit.script(model) if form == "script" else torch.jit.trace(model, batch(), check_trace=False)
    layer = torchgraft.inspect(base)["layers"][0]
    assert (layer["num_heads"], layer["num_kv_heads"], layer["hidden_size"]) == (4, 2, HIDDEN)
    grafted = torchgraft.graft(base, config=config, name="task")
    assert torch.allclose(grafted(*batch(), adapter_ids=NO_ADAPTER), model(*batch()), atol=1e-5)


def test_an_error_at_run_time_names_layer_and_location(tmp_path: Path) -> None:
    grafted = torchgraft.graft(torch.jit.script(LayerDrop().eval()), config="lora", name="task")
    grafted.save(str(tmp_path / "grafted.pt"))
    grafted.adapters.layer_1.selfattn_lora_v.lora_b = nn.Parameter(torch.zeros(1, 1, 1))
    loaded = torch.jit.load(tmp_path / "grafted.pt")
    for module in (grafted, loaded):
        module.adapters.layer_1.selfattn_lora_v.lora_b = nn.Parameter(torch.zeros(1, 1, 1))
        with pytest.raises(RuntimeError, match=r"layer 1, selfattn_lora_v, beside second\.query"):
            module(*batch())


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.runs = Plain(), 0

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.runs += 1
        return self.layer(x, mask)


_FROZEN = """
import sys, torch
torch.ops.load_library(sys.argv[1])
module = torch.jit.load(sys.argv[2]).eval()
frozen = torch.jit.freeze(module, preserved_attrs=sys.argv[3:])
del module
x, mask = torch.randn(3, 7, 32), torch.ones(3, 7, dtype=torch.long)
frozen(x, mask)
try:
    frozen(x, mask, torch.tensor([9, 0, 0]))
except Exception as error:
    print(str(error).strip().splitlines()[-1])
"""


def _error_of_frozen(module: torch.jit.ScriptModule, path: Path, *preserved: str) -> str:
    """Of wrong adapter_ids, in a process of its own, which such an error could end."""
    module.save(str(path))
    [library] = {each for each in torch.ops.loaded_libraries if "libtorchgraft.so" in each}
    command = [sys.executable, "-W", "ignore", "-c", _FROZEN, library, str(path), *preserved]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_WRONG_IDS = "RuntimeError: gated_lora_linear: expected adapter_ids in [-1, 1), got 9 in row 0"


def test_an_error_in_a_frozen_module_is_one_as_any_other(tmp_path: Path) -> None:
    assert _error_of_frozen(_graft(Plain()), tmp_path / "model.pt") == _WRONG_IDS


def test_a_base_that_assigns_attributes_is_warned_of_with_a_remedy_that_helps(tmp_path: Path) -> None:
    base = torch.jit.script(_Counts().eval())
    with pytest.warns(UserWarning, match="graft: forward assigns 'runs'; after torch.jit.freeze.*preserved_attrs"):
        module = torchgraft.graft(base, "lora", "task")
    assert _error_of_frozen(module, tmp_path / "model.pt", "base_forward", "grafted_forward") == _WRONG_IDS
