"""The tables of methods in docs/adapters.md: every cell is what torchgraft does, and what `adapters==1.3.0` reads.

Run as a program, it prints the cells that it finds.
"""

import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters.configuration import AdapterConfig
from adapters.configuration.adapter_config import ADAPTER_CONFIG_MAP

import adapters
import torchgraft
from grafted import base as base_of
from models import VARIANTS, make_batch
from oracle import make_oracle_adapter, oracle_for
from torchgraft import Average, BatchSplit, Fuse, HeadConfig, Split, Stack
from torchgraft._libraries import patcher
from torchgraft.configs import config_fields

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"
VARIANT = VARIANTS["bert_sdpa"]
FLOAT = torch.float32
BATCH = make_batch([7, 6, 7], 7, FLOAT)
INPUTS = VARIANT.arguments(BATCH)
# What a configuration needs on 48 features.
SMALL = dict.fromkeys(("compacter", "compacter++"), "reduction_factor=4")
# The library cannot drop whole branches out without torchvision, and no result of an eval mode depends on it.
SMALL["adapter_plus"] = "reduction_factor=4, stochastic_depth=0.0"


def with_values(config: str, *values: str) -> str:
    """ "lora[use_dora=True]" and "r=2" are "lora[use_dora=True, r=2]"; "compacter" is one that fits the small base."""
    name, _, inner = config.partition("[")
    small = "" if inner else SMALL.get(name, "")
    fields = [field for field in (inner.rstrip("]"), small, *values) if field]
    return f"{name}[{', '.join(fields)}]" if fields else name


def base() -> torch.jit.ScriptModule:
    return base_of(VARIANT.name, FLOAT)


def drawn(module: torch.jit.ScriptModule, name: str) -> None:
    """Gives a trainable adapter weights that change something."""
    generator = torch.Generator().manual_seed(ord(name))
    with torch.no_grad():
        for key, value in torchgraft.trainable_parameters(module, name).items():
            if ".original_" not in key:  # of LoReFT: it has signs, which torch cuts to whole numbers
                value.add_(torch.randn(value.shape, generator=generator) * 0.05)


@functools.cache
def trainable(config: str) -> torch.jit.ScriptModule:
    torch.manual_seed(1)
    module = torchgraft.graft(base(), config, "a", trainable=True)
    module = torchgraft.graft(module, config, "b", trainable=True)
    for name in "ab":
        drawn(module, name)
    return module


@functools.cache
def frozen(config: str) -> torch.jit.ScriptModule:
    return torchgraft.freeze_adapter(torchgraft.freeze_adapter(trainable(config), "a"), "b")


def run(module: torch.jit.ScriptModule, name: str | None = None, **arguments) -> torch.Tensor:
    if name is not None:
        module.activate(name) if name else module.deactivate()
    with torch.no_grad():
        return VARIANT.hidden(module(*INPUTS, **arguments))


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-5)


def begins(row: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a row of a batch is the row alone: where others have longer prompts, it ends with filler."""
    return same(row[: len(expected)], expected)


def made(call: Callable[[], object]) -> object | None:
    """What torchgraft gives; None where it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except torchgraft.GraftError:
        return None


def word(holds: object) -> str:
    return "yes" if holds else "no"


def gated(config: str) -> str:
    module = made(lambda: torchgraft.graft(base(), with_values(config, "use_gating=True"), "gated"))
    return word(module is not None and torchgraft.list_adapters(module)[0].gate_pooling)


def trains(config: str) -> str:
    module = trainable(config)
    parameters = torchgraft.trainable_parameters(module, "a")
    module.activate("a")
    gradients = torch.autograd.grad(VARIANT.hidden(module(*INPUTS)).pow(3).sum(), list(parameters.values()))
    return word(all(gradient.isfinite().all() for gradient in gradients) and any(map(torch.any, gradients)))


def shares_a_batch(config: str) -> str:
    module = torchgraft.graft(frozen(config), "unipelt", "other")
    mixed = run(module, adapter_ids=torch.tensor([1, -1, 2]))
    return word(all(begins(mixed[row], run(module, name)[row]) for row, name in enumerate(("b", "", "other"))))


def joins(config: str) -> str:
    """Whether it can be a part of a union with some other method, and runs."""
    for other in ("lora", "seq_bn", "prefix_tuning"):
        module = made(lambda other=other: torchgraft.graft(base(), f"{config}|{other}", "both"))
        if module is not None:
            return word(run(module).isfinite().all())
    return "no"


def averages(config: str) -> str:
    if made(lambda: torchgraft.average_adapter(frozen(config), "mean", ["a", "b"])):
        return "yes"
    return "when trainable" if made(lambda: torchgraft.average_adapter(trainable(config), "mean", ["a", "b"])) else "no"


def merges(config: str) -> str:
    merged = made(lambda: torchgraft.merge_adapter(frozen(config), "a", into_base=True))
    if merged is None:
        return "no"
    assert same(run(torchgraft.ungraft(merged)), run(frozen(config), "a"))
    of_gated = frozen(with_values(config, "use_gating=True"))
    return "yes" if made(lambda: torchgraft.merge_adapter(of_gated, "a", into_base=True)) else "without gate"


def has_head(config: str) -> str:
    for pooling, cell in (("mean", "yes"), ("first", "of token 0")):
        head = HeadConfig(num_labels=2, layers=1, pooling=pooling)
        module = made(lambda head=head: torchgraft.add_head(frozen(config), "a", head))
        if module is not None:
            module.activate("a")
            with torch.no_grad():
                assert module.forward_with_head(*INPUTS).shape == (3, 2)
            return cell
    return "no"


def lowers(config: str) -> str:
    return word(same(run(torchgraft.lower(frozen(config)), "b"), run(frozen(config), "b")))


def runs_in_int8(config: str) -> str:
    """quantize() of a grafted module, and its directory on an int8 base."""
    with tempfile.TemporaryDirectory() as folder:
        torchgraft.save_adapter(frozen(config), "b", folder)
        quantised = made(lambda: torchgraft.quantize(frozen(config)))
        loaded = made(lambda: torchgraft.load_adapter(torchgraft.quantize(base()), folder))
    if quantised is None or loaded is None:
        return "no"
    assert not same(run(quantised, "b"), run(quantised, ""))
    return word(same(run(quantised, "b"), run(loaded, "b")))


def in_a_pool(config: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        torchgraft.save_adapter(frozen(config), "a", folder)
        pool = torchgraft.AdapterPool(base(), capacity=2)
        pool.insert("a", folder)
        lease = pool.acquire(["a", "", "a"])
        found = run(lease.module, adapter_ids=lease.ids)
    return word(same(found[[0, 2]], run(frozen(config), "a")[[0, 2]]) and begins(found[1], run(frozen(config), "")[1]))


def exports(config: str) -> str:
    module = frozen(config)
    module.activate("a")
    program = made(lambda: torchgraft.export(module, INPUTS, adapter_ids=False, dynamic=False))
    return word(program is not None and same(VARIANT.hidden(program.module()(*INPUTS)), run(module)))


def _parts(config: dict) -> list[dict]:
    return config.get("configs", [config])


def saved_as(config: str) -> str:
    """How the directory of a frozen adapter differs from its configuration; it and a trainable one's load again."""
    with tempfile.TemporaryDirectory() as folder:
        for module in (trainable(config), frozen(config)):
            torchgraft.save_adapter(module, "a", folder, overwrite=True)
            assert same(run(torchgraft.load_adapter(base(), folder)), run(module, "a"))
        written = json.loads(patcher().normalise_config((Path(folder) / "adapter_config.json").read_text()))
    wanted = config_fields(config)
    pairs = list(zip(_parts(wanted), _parts(written), strict=True))
    changed = {key for before, after in pairs for key in before if before[key] != after.get(key)}
    if "flat" in changed:
        return "with flat prefixes"
    if "phm_layer" in changed:
        return "as a bottleneck"
    if changed:
        return "as a DoRA" if any(after.get("use_dora") for _, after in pairs) else "as a LoRA"
    return "as trained"


@functools.cache
def with_head() -> torch.nn.Module:
    """The library's model for heads, on the base's weights: only there it saves and reads what its layers share."""
    plain = oracle_for(VARIANT, FLOAT).model
    model = adapters.BertAdapterModel(plain.config)
    held = plain.state_dict()
    model.bert.load_state_dict({key: held[key] for key in model.bert.state_dict() if key in held}, strict=False)
    return model.to(FLOAT)


def result_of_library(model: torch.nn.Module, name: str) -> torch.Tensor:
    model.set_active_adapters(name)
    model.eval()
    with torch.no_grad():
        found = model(BATCH.ids, BATCH.mask)[0]
    model.set_active_adapters(None)
    return found


def reads(model: torch.nn.Module, module: torch.jit.ScriptModule) -> bool:
    """Whether the library gives what `module` gives, of what is written of it."""
    with tempfile.TemporaryDirectory() as folder:
        torchgraft.save_adapter(module, "a", folder)
        name = model.load_adapter(folder, use_safetensors=True, with_head=False)
    found = result_of_library(model.to(FLOAT), name)
    model.delete_adapter(name)
    return same(found, run(module, "a"))


def read_by_library(config: str) -> str:
    """What is written of a trainable and of a frozen adapter."""
    plain = oracle_for(VARIANT, FLOAT).model
    if not reads(plain, frozen(config)):
        return "no"
    if reads(plain, trainable(config)):
        return "yes"
    return "trainable: with a head" if reads(with_head(), trainable(config)) else "when frozen"


def writes(model: torch.nn.Module, config: str) -> bool:
    """Whether torchgraft gives what the library's adapter gives, of what the library writes of it."""
    library_config = ADAPTER_CONFIG_MAP.get(config) or AdapterConfig.load(config_fields(config))
    make_oracle_adapter(model, library_config, "theirs", 5)
    expected = result_of_library(model, "theirs")
    assert not same(expected, run(base()))
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(folder, "theirs", with_head=False)
        model.delete_adapter("theirs")
        loaded = [made(lambda flag=flag: torchgraft.load_adapter(base(), folder, trainable=flag)) for flag in (0, 1)]
    return all(module is not None and same(run(module), expected) for module in loaded)


def read_from_library(config: str) -> str:
    if writes(oracle_for(VARIANT, FLOAT).model, config):
        return "yes"
    return "with a head" if writes(with_head(), config) else "no"


def composes(block: torchgraft.AdapterCompositionBlock, config: str) -> str:
    module = frozen(config)
    if isinstance(block, Fuse):
        module = made(lambda: torchgraft.add_adapter_fusion(frozen(config), block))
    composed = None if module is None else made(lambda: torchgraft.compose(module, "c", block, example=INPUTS))
    if composed is None:
        return "no"
    if not isinstance(block, BatchSplit):  # which needs as many rows as it says
        mixed = run(composed, adapter_ids=torch.tensor([2, -1, 2]))
        assert same(mixed[1], run(composed, "")[1])
    return word(not same(run(composed, "c"), run(composed, "")))


PROBES: dict[str, Callable[[str], str]] = {
    "gate": gated,
    "trained": trains,
    "in one batch with others": shares_a_batch,
    "in a union": joins,
    "averaged": averages,
    "merged": merges,
    "head": has_head,
    "lowered": lowers,
    "int8": runs_in_int8,
    "pool": in_a_pool,
    "exported": exports,
    "saved when frozen": saved_as,
    "library reads it": read_by_library,
    "read from the library": read_from_library,
    **{type(block).__name__: functools.partial(composes, block) for block in (
        Stack("a", "b"), Average("a", "b"), BatchSplit("a", "b", batch_sizes=[2, 1]), Split("a", "b", splits=[3, 4]),
        Fuse("a", "b"))},
}  # fmt: skip


def tables() -> dict[str, dict[str, str]]:
    """The cells of the document, by configuration and by column."""
    result: dict[str, dict[str, str]] = {}
    heads: list[str] = []
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            heads = []
        elif cells[:2] == ["method", "configurations"]:
            heads = cells
        elif heads and not line.startswith("|---"):
            row = dict(zip(heads, cells, strict=True))
            for config in row["configurations"].split("`")[1::2]:
                result.setdefault(config, {}).update(row)
    return result


def kinds_of(config: str) -> set[str]:
    """The architectures of a configuration's parts, as the library calls them."""
    return {str(part.get("architecture")) for part in _parts(config_fields(config))}


def test_the_tables_have_all_columns_and_all_methods() -> None:
    found = tables()
    for config, cells in found.items():
        assert set(cells) == {"method", "configurations", *PROBES}, config
    kinds = {kind for config in found for kind in kinds_of(config)}
    assert kinds == {kind for name in patcher().config_names() for kind in kinds_of(name)}
    assert {"lora", "dvora", "compacter++", "direft", "seq_bn_inv", "unipelt"} <= set(found)


# One of each kind of method in every run.
_OFTEN = ("seq_bn", "lora", "prefix_tuning", "loreft", "seq_bn_inv", "unipelt")


@pytest.mark.parametrize("column", PROBES)
@pytest.mark.parametrize(
    "config",
    [pytest.param(each, marks=[pytest.mark.slow(seconds=1)] * (each not in _OFTEN)) for each in tables()],
)
def test_a_cell_is_true(config: str, column: str) -> None:
    assert PROBES[column](with_values(config)) == tables()[config][column]


if __name__ == "__main__":
    for name in sys.argv[1:] or list(tables()):
        print(name, {column: probe(with_values(name)) for column, probe in PROBES.items()}, flush=True)
