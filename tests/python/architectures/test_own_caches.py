"""Hand-written decoders with caches of several kinds: each step equals the same tokens in one pass of the decoder
without a cache, which has the same weights and adapters."""

import copy
import functools
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import oracle
import own_cached_models as own
import torchgraft
from cached_decoders import PROMPT, masks_and_positions, tokens_of
from grafted import reloaded
from int8_reference import quantised
from models import POSITIONS
from restated_reference import RestatedReference

METHODS = ("lora_all", "double_seq_bn", "prefix_flat")
IDS = torch.tensor([0, 1, 2, -1])  # of the rows of tokens_of()
GROWING = ("OptionalList", "BothSides", "Dictionary", "Stacked", "HiddenStates", "NormedStates", "OptionalStates")
STATES = ("StaticStates", "StaticStatesInPlace")
ONE_TOKEN = ("Where", "OneHot")
WRITTEN = ("IndexCopy", "IndexCopyInPlace", "SliceAssignment", "IndexPut", "Scatter", "ClonedSlice", "ScaledSlice")
STATIC = (*WRITTEN, "ReadSlice", *ONE_TOKEN, *STATES)


def _empty(name: str, rows: int) -> tuple:
    """The cache before the first token, as arguments behind the positions."""
    size = (own.KV_HEADS, own.HEAD_DIM)
    if name in STATES:
        return ([torch.zeros(rows, POSITIONS, own.HIDDEN) for _ in range(own.LAYERS)],)
    if name in STATIC:
        return tuple([torch.zeros(rows, POSITIONS, *size) for _ in range(own.LAYERS)] for _ in range(2))
    nothing = torch.zeros(rows, 0, *size)
    return {
        "OptionalList": (None,),
        "OptionalStates": (None,),
        "BothSides": (None,),
        "Dictionary": ({f"{kind}.{i}": nothing for kind in ("keys", "values") for i in range(own.LAYERS)},),
        "Stacked": (torch.zeros(own.LAYERS, 2, rows, 0, *size),),
        "HiddenStates": ([torch.zeros(rows, 0, own.HIDDEN) for _ in range(own.LAYERS)],),
        "NormedStates": ([torch.zeros(rows, 0, own.HIDDEN) for _ in range(own.LAYERS)],),
    }[name]


def _arguments(name: str, real: Tensor, begin: int, end: int) -> tuple[Tensor, ...]:
    """Mask, positions and, for static caches, places of the tokens [begin, end)."""
    mask, positions = masks_and_positions(real[:, :end], end - begin)
    if name not in STATIC:
        return mask, positions
    hidden = torch.full((*mask.shape[:3], POSITIONS - end), torch.finfo(torch.float32).min)
    return torch.cat([mask, hidden], -1), positions, torch.arange(begin, end)


def _steps(name: str, module: torch.jit.ScriptModule, ids: Tensor, real: Tensor, **named: Tensor) -> tuple:
    past, hidden = _empty(name, ids.size(0)), []
    prompt = 1 if name in ONE_TOKEN else PROMPT
    for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.size(1)))]:
        part, past = module(ids[:, begin:end], *_arguments(name, real, begin, end), *past, **named)
        past = past if name in STATIC else (past,)
        hidden.append(part)
    return torch.cat(hidden, 1), past


def _make(name: str) -> nn.Module:
    torch.manual_seed(5)
    return getattr(own, name)().eval()


@functools.cache
def _uncached() -> tuple[torch.jit.ScriptModule, dict[str, Path]]:
    """The decoder without a cache, with random adapters, and their directories."""
    base = torch.jit.script(_make("Decoder"))
    module = RestatedReference(_make, lambda model: []).graft(base, list(METHODS), torch.float32)
    folder = Path(tempfile.mkdtemp(prefix="torchgraft_own_caches_"))
    for method in METHODS:
        torchgraft.save_adapter(module, method, folder / method)
    return module, {method: folder / method for method in METHODS}


def _base(name: str, form: str) -> torch.jit.ScriptModule:
    if form == "scripted":
        return torch.jit.script(_make(name))
    ids, real = tokens_of(2)
    example = (ids[:, :3], *_arguments(name, real, 0, 3), *_empty(name, 2))
    return torch.jit.trace(_make(name), example, check_trace=False, strict=False)


_FORMS = [(name, "scripted") for name in GROWING + STATIC] + [
    (name, "traced")
    for name in ("Stacked", "HiddenStates", "Dictionary", "IndexCopy", "IndexCopyInPlace", "IndexPut", *STATES)
]


@pytest.mark.parametrize(("name", "form"), _FORMS)
@torch.no_grad()
def test_steps_equal_one_pass_without_a_cache(name: str, form: str) -> None:
    whole, directories = _uncached()
    base = _base(name, form)
    layers = torchgraft.inspect(base)["layers"]
    kind = "static" if name in STATIC else "growing"
    assert [(layer["kind"], layer["cache"]) for layer in layers] == [("self", kind)] * own.LAYERS
    module = torchgraft.graft(base, adapters=directories)
    ids, real = tokens_of()
    found, _ = _steps(name, module, ids, real, adapter_ids=IDS)
    expected = whole(ids, *masks_and_positions(real, ids.size(1)), adapter_ids=IDS)
    assert oracle.difference(found[real], expected[real]) <= 1e-5
    module.deactivate()
    (found, kept), (expected, base_kept) = (_steps(name, each, ids, real) for each in (module, base))
    assert torch.equal(found, expected)
    for a, b in zip(_tensors(kept), _tensors(base_kept), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["OptionalList", "NormedStates", "IndexCopy", "ReadSlice"])
@torch.no_grad()
def test_int8_steps_are_torchs_with_and_without_adapters(name: str) -> None:
    ids, real = tokens_of()
    float32, packed = torch.jit.script(_make(name)), quantised(_make(name), "per_channel")
    found, _ = _steps(name, reloaded(torchgraft.quantize(float32)), ids, real)
    expected, _ = _steps(name, packed, ids, real)
    assert oracle.difference(found[real], expected[real]) <= 1e-5
    _, directories = _uncached()
    after = torchgraft.quantize(torchgraft.graft(float32, adapters=directories, verify=False))
    before = torchgraft.graft(torch.jit.script(packed), adapters=directories, verify=False)
    found, expected = (_steps(name, each, ids, real, adapter_ids=IDS)[0] for each in (after, before))
    assert oracle.difference(found[real], expected[real]) <= 1e-5


@torch.no_grad()
def test_a_program_of_fixed_sizes_writes_tokens_one_by_one() -> None:
    ids, real = tokens_of()
    cache = [tensor for part in _empty("IndexCopy", ids.size(0)) for tensor in part]
    example = (ids[:, :1], *_arguments("IndexCopy", real, 0, 1), cache[:2], cache[2:])
    base = torchgraft.from_program(torch.export.export(_make("IndexCopy"), example, strict=False))
    whole, directories = _uncached()
    module = torchgraft.graft(base, adapters=directories, verify=False)
    parts = []
    for i in range(ids.size(1)):
        part, *cache = _tensors(module(ids[:, i : i + 1], *_arguments("IndexCopy", real, i, i + 1), *cache,
                                       adapter_ids=IDS))  # fmt: skip
        parts.append(part)
    expected = whole(ids, *masks_and_positions(real, ids.size(1)), adapter_ids=IDS)
    assert oracle.difference(torch.cat(parts, 1)[real], expected[real]) <= 1e-5


def test_a_view_of_the_cache_that_is_taken_before_the_write_is_refused() -> None:
    """A LoRA on the keys would be left out as another pass's."""
    base = torch.jit.script(_make("ViewBeforeWrite"))
    reason = (
        "its keys or values were taken from a cache before something writes into the cache; read it behind the write"
    )
    assert [reason in miss for miss in torchgraft.inspect(base)["near_misses"]] == [True] * own.LAYERS
    with pytest.raises(torchgraft.GraftError, match="read it behind the write"):
        torchgraft.graft(base, config="lora", name="task")


@pytest.mark.parametrize("name", ["CopiedBehindWrite", "CopiedBehindView"])
def test_a_copy_of_a_cache_that_was_written_is_none_that_another_pass_has_filled(name: str) -> None:
    found = torchgraft.inspect(torch.jit.script(_make(name)))["layers"]
    assert [(layer["kind"], layer["cache"]) for layer in found] == [("self", "static")] * own.LAYERS


class _WrittenCopy(nn.Module):
    """One attention over a copy of a cache [B, heads, T, head size] that the trace writes through slices."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.q, self.k, self.v))
        all_keys, all_values = keys.clone(), values.clone()
        all_keys[:, :, places] = k
        all_values[:, :, places] = v
        mixed = nn.functional.scaled_dot_product_attention(q, all_keys.clone(), all_values.clone())
        return x + self.o(mixed.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_a_copy_of_what_was_written_through_slices_holds_this_pass() -> None:
    example = (torch.randn(2, 3, 8), torch.zeros(2, 2, 5, 4), torch.zeros(2, 2, 5, 4), torch.arange(3))
    model = _WrittenCopy().eval()
    base = torch.jit.trace(model, example)
    layer = torchgraft.inspect(base)["layers"][0]
    assert (layer["kind"], layer["cache"], layer["key"]["path"]) == ("self", "static", "k")
    module = torchgraft.graft(base, config=torchgraft.LoRAConfig(attn_matrices=["k"]), name="task")
    lora = module.adapters.layer_0.selfattn_lora_k
    assert oracle.difference(module(*example), model(*example)) <= 1e-5
    lora.lora_b.normal_()
    merged = copy.deepcopy(model)  # the base's weights are on the model's memory
    merged.k.weight += lora.lora_b[0] @ lora.lora_a[0]  # alpha = r
    assert oracle.difference(module(*example), merged(*example)) <= 1e-5


@torch.no_grad()
def test_a_memory_of_another_pass_is_read_by_products() -> None:
    states = _make("MemoryStates")
    methods = ["double_seq_bn"]
    whole = RestatedReference(_make, lambda model: []).graft(torch.jit.script(states), methods, torch.float32)
    folder = Path(tempfile.mkdtemp(prefix="torchgraft_memory_"))
    for method in methods:
        torchgraft.save_adapter(whole, method, folder / method)
    base = torch.jit.script(_make("Memory"))
    assert [layer["cache"] for layer in torchgraft.inspect(base)["layers"]] == ["filled"] * own.LAYERS
    module = torchgraft.graft(base, adapters={method: folder / method for method in methods})
    ids, _ = tokens_of(3)
    memory = tokens_of(3, seed=6)[0][:, :7]
    positions = torch.arange(ids.size(1)).expand(3, -1)
    rows = torch.tensor([0, -1, 0])
    expected = whole(ids, positions, memory, adapter_ids=rows)
    assert oracle.difference(module(ids, positions, states.keys_of(memory), adapter_ids=rows), expected) <= 1e-5


@pytest.mark.parametrize("name", ["IndexCopy", "HiddenStates", "NormedStates", "StaticStates"])
def test_unpadded_gates_need_a_mask_that_ends_with_the_tokens_of_the_pass(name: str) -> None:
    base = torch.jit.script(_make(name))
    with pytest.raises(torchgraft.GraftError, match='use gate_pooling="all", or a cache that grows by torch.cat'):
        torchgraft.graft(base, config="unipelt", name="task", gate_pooling="unpadded")


def _tensors(cache: object) -> list[Tensor]:
    if isinstance(cache, Tensor):
        return [cache]
    parts = cache.values() if isinstance(cache, dict) else cache
    return [tensor for part in parts for tensor in _tensors(part)]
