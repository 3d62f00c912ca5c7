"""References for models that AdapterHub does not know: the methods restated in plain PyTorch, applied by hooks.

A reference knows the eager model, and by module path where in it each location of a layer is (Layer). It reads the
adapter's parameters from the grafted module's state_dict, and shares no code with the patcher or the operators.
test_restated_reference.py compares it with the library on BERT, ViT and BART, and so shows that it is the definition.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
from case import Gates
from torchgraft._libraries import patcher
from torchgraft.configs import config_to_json

_ACTIVATIONS = {"relu": F.relu, "swish": F.silu}


@dataclass(frozen=True)
class Attention:
    """Module paths of one attention sublayer.

    query, key, value: Linear modules. One path three times: a packed projection, rows [query; key; value].
    branch: its result is what is added to the residual stream; residual: its first input is that stream.
    norm: for post-norm layers, what normalises the sum; None for pre-norm.
    slots: "self", "cross", or "encoder": self attention of an encoder that feeds a decoder.
    """

    query: str
    key: str
    value: str
    branch: str
    residual: str
    norm: str | None = None
    kind: str = "self"


@dataclass(frozen=True)
class FeedForward:
    """Module paths: up is the Linear without activation of a gated feed-forward. The rest as in Attention."""

    up: str
    down: str
    branch: str
    residual: str
    norm: str | None = None


@dataclass(frozen=True)
class Layer:
    """One Transformer layer; number as the grafted module has it."""

    number: int
    attentions: tuple[Attention, ...]
    feed_forward: FeedForward


@dataclass(frozen=True, eq=False)
class RestatedReference:
    """make(dtype): an eager model whose attention is F.scaled_dot_product_attention, with Linear projections.

    layers(model): its layers. Hidden states are [B, S, H] in all of them.
    hidden(result): the compared tensor.
    """

    make: Callable[[torch.dtype], nn.Module]
    layers: Callable[[nn.Module], list[Layer]]
    hidden: Callable = lambda result: result[0] if isinstance(result, tuple) else result

    def graft(
        self, base: torch.jit.ScriptModule, methods: list[str], dtype: torch.dtype, verify: bool = True
    ) -> torch.jit.ScriptModule:
        specs = [(method, config_to_json(oracle.CONFIGS[method]), None, "", False, None) for method in methods]
        grafted, _ = patcher().graft(base._c, specs, "all", "", "", verify)
        grafted = torch.jit._recursive.wrap_cpp_module(grafted)
        randomise_grafted(grafted)
        return grafted

    def run(self, grafted: torch.jit.ScriptModule, method: str, arguments: tuple) -> tuple[Tensor, Gates]:
        slots = slots_of(grafted, grafted.adapter_names().index(method))
        dtype = next(value.dtype for slot in slots.values() for value in slot.values() if value.is_floating_point())
        return self.restate(slots, method, dtype, arguments)

    @torch.no_grad()
    def restate(self, slots: "Slots", method: str | None, dtype: torch.dtype, arguments: tuple) -> tuple[Tensor, Gates]:
        """The model's result with the adapter whose parameters are given; method None and no slots: the base's."""
        model = _made(self, dtype)
        with _Restatement(slots, _bottleneck_config(method)).on(model, self.layers(model)) as record:
            result = self.hidden(model(*arguments))
        assert set(record.runs) == set(slots), f"without a module: {sorted(set(slots) - set(record.runs))}"
        return result, record.gates()


# slots[0, "self_prefix"]["prefix_key"]: one adapter's parameters, without the bank's first dimension and its padding.
Slots = dict[tuple[int, str], dict[str, Tensor]]


@functools.cache
def _made(reference: RestatedReference, dtype: torch.dtype) -> nn.Module:
    return reference.make(dtype)


# The parameter that is never zero in a fresh adapter, and in which dimension of one adapter its size is. What a bank
# holds beyond the size is padding; where all is zero, the adapter has nothing there.
_SIZED = {"lora_a": 0, "down_weight": 0, "prefix_key": 1}
# Others with that size: the dimension.
_SIZES = {"lora_b": 1, "down_bias": 0, "up_weight": 1, "prefix_value": 1}


def _banks(grafted: torch.jit.ScriptModule) -> dict[tuple[str, str], dict[str, Tensor]]:
    """From adapters.layer_3.self_prefix.prefix_key, adapters.layer_3.mh_adapter_seq_relu.up_bias and the like:
    ("layer_3", "self_prefix") -> parameters of the bank."""
    banks: dict[tuple[str, str], dict[str, Tensor]] = {}
    for path, value in grafted.state_dict().items():
        parts = path.split(".")
        if parts[0] == "adapters" and len(parts) == 4:
            banks.setdefault((parts[1], parts[2]), {})[parts[3]] = value
    return banks


def _of_one(bank: dict[str, Tensor], adapter: int) -> dict[str, Tensor]:
    """Views on an adapter's part of the bank, without padding; empty where it has none."""
    mine = {name: value[adapter] for name, value in bank.items()}
    [sized] = set(mine) & set(_SIZED)
    used = mine[sized].movedim(_SIZED[sized], 0).flatten(1).ne(0).any(1)
    size = int(used.sum())
    if size == 0:
        return {}
    assert bool(used[:size].all()), "padding is on the right"
    for name, dimension in {sized: _SIZED[sized], **_SIZES}.items():
        if name in mine:
            mine[name] = mine[name].narrow(dimension, 0, size)
    if "gate_bias" in mine and bool(mine["gate_bias"].isposinf().all()):  # it has no gate, others of the bank have
        assert not mine["gate_weight"].any()
        del mine["gate_weight"], mine["gate_bias"]
    return mine


def slots_of(grafted: torch.jit.ScriptModule, adapter: int = 0) -> Slots:
    """Copies of an adapter's parameters."""
    slots: Slots = {}
    for (layer, slot), bank in _banks(grafted).items():
        mine = _of_one(bank, adapter)
        if mine:
            key = int(layer.removeprefix("layer_")), re.sub(r"_adapter_.*", "_adapter", slot)
            assert key not in slots
            slots[key] = {name: value.clone() for name, value in mine.items()}
    return slots


def randomise_grafted(grafted: torch.jit.ScriptModule) -> None:
    """Normal values for every parameter of the fresh adapters: none is zero, gates are well away from 0.5. The bank's
    padding stays."""
    generator = torch.Generator().manual_seed(23)
    for _, bank in sorted(_banks(grafted).items()):
        for adapter in range(next(iter(bank.values())).size(0)):
            for name, parameter in sorted(_of_one(bank, adapter).items()):
                if name in ("scaling", "prefix_length"):  # alpha / r, or the configured number
                    continue
                value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                if name == "gate_bias":
                    value = torch.sign(value) * (0.7 + 0.4 * value.abs())
                elif name == "gate_weight":
                    value = value * 0.15
                elif name.startswith("prefix"):
                    value = value * 0.8
                elif name.endswith("bias"):
                    value = value * 0.2
                else:
                    value = value * 1.2 / parameter.size(-1) ** 0.5
                parameter.copy_(value)


def _bottleneck_config(method: str | None):
    """The bottleneck's configuration among those of the method, if it has one."""
    if method is None:
        return None
    config = oracle.CONFIGS[method]
    for each in getattr(config, "configs", [config]):
        if each.architecture is None:
            return each
    return None


def _gate(x: Tensor, parameters: dict[str, Tensor]) -> Tensor | None:
    """mean over tokens of sigmoid(x w^T + b), [B, G]; None when the module has no gate."""
    if "gate_weight" not in parameters:
        return None
    return torch.sigmoid(F.linear(x, parameters["gate_weight"], parameters["gate_bias"])).mean(1)


@dataclass
class _Restatement:
    """Hooks on one model during one call."""

    slots: Slots
    bottleneck: object
    recorded: dict = field(default_factory=dict)  # (layer, location): [((run, order), gate [B, G])]
    runs: dict = field(default_factory=dict)
    waiting: tuple | None = None  # (layer, slot, x): the attention whose projections have run, but whose core has not

    @contextlib.contextmanager
    def on(self, model: nn.Module, layers: list[Layer]) -> Iterator["_Restatement"]:
        handles = []
        for layer in layers:
            for attention in layer.attentions:
                handles += self._hook_projections(model, layer.number, attention)
            handles += self._hook_linear(model, layer.number, layer.feed_forward.up, "intermediate_lora")
            handles += self._hook_linear(model, layer.number, layer.feed_forward.down, "output_lora")
            for attention in layer.attentions:
                slot = "cross_adapter" if attention.kind == "cross" else "mh_adapter"
                handles += self._hook_branch(model, layer.number, attention, slot)
            handles += self._hook_branch(model, layer.number, layer.feed_forward, "output_adapter")
        core = F.scaled_dot_product_attention
        try:
            with mock.patch.object(F, "scaled_dot_product_attention", functools.partial(self._attend, core)):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def gates(self) -> Gates:
        """Columns: runs of shared weights from left to right; self before cross attention; q, k, v."""
        result: Gates = {}
        for (layer, location), columns in self.recorded.items():
            columns = sorted(columns, key=lambda column: column[0])
            result.setdefault(layer, {})[location] = torch.cat([gate for _, gate in columns], dim=1)
        return result

    def _record(self, layer: int, slot: str, gate: Tensor | None) -> None:
        run = self.runs[layer, slot] = self.runs.get((layer, slot), -1) + 1
        if gate is None:
            return
        location = "selfattn_lora" if "attn_lora" in slot else slot
        matrix = "qkv".find(slot[-1]) if location == "selfattn_lora" else 0
        self.recorded.setdefault((layer, location), []).append(((run, "crossattn" in slot, matrix), gate))

    def _lora(self, layer: int, slot: str, x: Tensor, shape: torch.Size) -> Tensor:
        """scaling (or gate) x A^T B^T, laid out as the model's hidden states."""
        parameters = self.slots[layer, slot]
        gate = _gate(x, parameters)
        self._record(layer, slot, gate)
        factor = parameters["scaling"] if gate is None else gate[:, :, None]
        update = factor * F.linear(F.linear(x, parameters["lora_a"]), parameters["lora_b"])
        return update.reshape(shape)

    def _hook_linear(self, model: nn.Module, layer: int, path: str, slot: str) -> list:
        if (layer, slot) not in self.slots:
            return []

        def hook(module, inputs, output):
            return output + self._lora(layer, slot, inputs[0], output.shape)

        return [model.get_submodule(path).register_forward_hook(hook)]

    def _hook_projections(self, model: nn.Module, layer: int, attention: Attention) -> list:
        """LoRA on the query, key and value; and a note of which attention the next core belongs to."""
        prefix = "crossattn_lora" if attention.kind == "cross" else "selfattn_lora"
        packed = attention.query == attention.key == attention.value
        paths = {"q": attention.query, "k": attention.key, "v": attention.value}
        handles = []
        for index, (matrix, path) in enumerate(paths.items()):
            if (layer, f"{prefix}_{matrix}") not in self.slots:
                continue

            def hook(module, inputs, output, index=index, slot=f"{prefix}_{matrix}"):
                if not packed:
                    return output + self._lora(layer, slot, inputs[0], output.shape)
                thirds = list(output.chunk(3, dim=-1))
                thirds[index] = thirds[index] + self._lora(layer, slot, inputs[0], thirds[index].shape)
                return torch.cat(thirds, dim=-1)

            handles.append(model.get_submodule(path).register_forward_hook(hook))

        def remember(module, inputs):
            self.waiting = (layer, f"{attention.kind}_prefix", inputs[0])

        return [*handles, model.get_submodule(attention.query).register_forward_pre_hook(remember)]

    def _attend(self, core, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options) -> Tensor:
        """Prefixes in front of keys and values, seen by every query; the gate scales both."""
        layer, slot, x = self.waiting or (None, None, None)
        if (layer, slot) not in self.slots:
            return core(query, key, value, attn_mask, dropout_p, is_causal, **options)
        self.waiting = None
        parameters = self.slots[layer, slot]
        gate = _gate(x, parameters)
        self._record(layer, slot, gate)
        prefixes = []
        for index, (name, like) in enumerate((("prefix_key", key), ("prefix_value", value))):
            prefix = parameters[name].unsqueeze(0)  # [1, h_kv, P, d]
            prefix = prefix.repeat_interleave(like.size(1) // prefix.size(1), dim=1).expand(like.size(0), -1, -1, -1)
            prefixes.append(prefix if gate is None else gate[:, index % gate.size(1), None, None, None] * prefix)
        length, queries, keys = prefixes[0].size(2), query.size(2), key.size(2)
        mask = torch.zeros(queries, keys, dtype=query.dtype) if attn_mask is None else attn_mask
        if is_causal:
            mask = torch.ones(queries, keys, dtype=torch.bool).tril()
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        mask = torch.cat([mask.new_zeros(*mask.shape[:-1], length), mask.expand(*mask.shape[:-1], keys)], dim=-1)
        key, value = torch.cat([prefixes[0], key], dim=2), torch.cat([prefixes[1], value], dim=2)
        return core(query, key, value, mask, dropout_p, False, **options)

    def _hook_branch(self, model: nn.Module, layer: int, part: Attention | FeedForward, slot: str) -> list:
        """branch becomes branch + scaling gate (f(x W_down^T + b) W_up^T + b)."""
        if (layer, slot) not in self.slots:
            return []
        parameters, config, stream = self.slots[layer, slot], self.bottleneck, []

        def remember(module, inputs):
            stream.append(inputs[0])

        def hook(module, inputs, branch):
            first = branch[0] if isinstance(branch, tuple) else branch
            residual = stream.pop()
            x = residual if config["is_parallel"] else first
            if config["original_ln_before"] and not config["is_parallel"]:
                x = first + residual
                if part.norm is not None:
                    x = model.get_submodule(part.norm)(x)
            down = F.linear(x, parameters["down_weight"], parameters["down_bias"])
            up = F.linear(_ACTIVATIONS[config["non_linearity"]](down), parameters["up_weight"], parameters["up_bias"])
            gate = _gate(x, parameters)
            self._record(layer, slot, gate)
            up = parameters["scaling"] * (up if gate is None else gate[:, :, None] * up)
            changed = first + up
            return (changed, *branch[1:]) if isinstance(branch, tuple) else changed

        residual = model.get_submodule(part.residual).register_forward_pre_hook(remember)
        return [residual, model.get_submodule(part.branch).register_forward_hook(hook)]
