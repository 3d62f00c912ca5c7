"""Parallel: equal to `adapters==1.3.0` with set_active_adapters(Parallel(...)), child by child."""

import functools
import json

import pytest
import torch

import torchgraft
from grafted import base, reloaded
from models import VARIANTS, Batch, make_batch
from odd_layers import HIDDEN, Plain
from oracle import difference, oracle_for
from test_compositions import DTYPE, TOLERANCE, bank, expected, expected_states, library_block, parts_of, run, saved
from thinned import thinned
from torchgraft import Average, BatchSplit, Parallel, Split, Stack
from torchgraft.training.batches import EncodedExamples
from torchgraft.training.options import TrainingOptions
from torchgraft.training.trainer import Trainer

pytestmark = pytest.mark.quick


def repeated_by_the_caller(variant: str, batch: Batch, block, channels: int) -> torch.Tensor:
    """The library's result where it cannot repeat the rows itself: it takes inputs that the caller has repeated."""
    model = oracle_for(VARIANTS[variant], DTYPE).model
    model.set_active_adapters(library_block(variant, block))
    ids, mask = batch.ids.repeat(channels, 1), batch.mask.repeat(channels, 1)
    with torch.no_grad():
        return model(ids, mask, adapter_input_parallelized=True)[0]


def composed(variant: str, block, verify: bool = False) -> torch.jit.ScriptModule:
    return torchgraft.compose(bank(variant, *parts_of(block)), "c", block, verify=verify)


BLOCKS = [
    Parallel("bn", "bn2"),
    Parallel("gated", "bn", "bn2"),
    Parallel("par", "bn"),
    Parallel("lora", "lora2", "dora"),
    Parallel("ia3", "ia3b"),
    Parallel("prefix", "prefix3"),
    Parallel("mam", "mam"),
    Parallel("bn"),
    Stack("lora2", Parallel("gated", "bn2")),
    Stack("prefix", Parallel("prefix3", "prefix")),
    Stack(Parallel("prefix", "prefix3"), "prefix"),
    Stack(Parallel("bn", "bn2"), Parallel("bn2", "gated")),
    Stack(Parallel("bn", "bn2"), BatchSplit("bn", "bn2", batch_sizes=[3, 5])),
    Stack(Split("bn", "bn2", splits=[4, 5]), Parallel("bn", "bn2")),
    Parallel(Average("bn", "bn2", weights=[0.25, 0.75]), Stack("bn", "bn2")),
    Parallel(BatchSplit("bn", "bn2", batch_sizes=[1, 3]), "bn"),
]


# On the second base: each kind of adapter, and a Parallel under a Stack and over one.
_SECOND = {BLOCKS[i] for i in (1, 3, 5, 9, 11, 14)}


@pytest.mark.parametrize(
    ("variant", "block"),
    thinned(
        [(variant, block) for variant in ("bert_sdpa", "distilbert_eager") for block in BLOCKS],
        lambda each: each[0] == "bert_sdpa" or each[1] in _SECOND,
    ),
    ids=str,
)
def test_parallel_equals_the_library(variant: str, block) -> None:
    module = composed(variant, block)
    batch = make_batch([9, 4, 7, 2], 9, DTYPE, 3)
    wanted = expected_states(variant, batch, block)
    by_id = run(module, variant, batch, adapter_ids=torch.full([4], len(parts_of(block))))
    module.activate("c")
    assert difference(run(module, variant, batch), wanted) <= TOLERANCE
    assert difference(by_id, wanted) <= TOLERANCE
    one = batch.row(1)
    if "BatchSplit" not in repr(block):
        assert difference(run(module, variant, one), expected_states(variant, one, block)) <= TOLERANCE


# Rows that the library fails to repeat, each for a reason of its own: a parallel bottleneck comes first, a LoRA repeats
# the keys and not what the gate of a prefix reads, a gated prefix has those of the batch.
@pytest.mark.parametrize(
    "block",
    [
        Parallel("par", "par2"),
        Parallel("bn", "par"),
        Parallel("unipelt", "unipelt"),
        Stack("prefix2", Parallel("prefix", "prefix3")),
        Parallel("prefix", BatchSplit("prefix", "prefix3", batch_sizes=[1, 3])),
    ],
    ids=repr,
)
def test_rows_that_the_library_cannot_repeat(block) -> None:
    batch = make_batch([9, 4, 7, 2], 9, DTYPE, 3)
    with pytest.raises(RuntimeError):
        expected_states("bert_sdpa", batch, block)
    module = composed("bert_sdpa", block)
    module.activate("c")
    wanted = repeated_by_the_caller("bert_sdpa", batch, block, 2)
    assert difference(run(module, "bert_sdpa", batch), wanted) <= TOLERANCE


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Parallel("normed", "bn"), "a part of a Parallel is a Split or does nothing there"),
        (Parallel("bn", "lora"), "an adapter of a Parallel does nothing there"),
        (Parallel("prefix", "prefix2"), "the adapters of a Parallel have prefixes of different lengths"),
        (Stack(Parallel("prefix", "prefix3"), "prefix2"), "a prefix with a gate stands behind a Parallel"),
        (Stack(Parallel("bn", "bn2"), Parallel("bn", "bn2", "gated")), "Parallel blocks with different numbers of"),
        (Stack(BatchSplit("bn", "bn2", batch_sizes=[2, 2]), Parallel("bn", "bn2")), "a Parallel behind a BatchSplit"),
        (Parallel("bn", Split("bn", "bn2", splits=[4, 5])), r"cannot nest Split\(.*\) inside Parallel"),
        (Average("bn", Parallel("bn", "bn2")), r"cannot nest Parallel\(bn, bn2\) inside Average"),
    ],
    ids=repr,
)
def test_what_cannot_be_in_parallel_is_named(block, message: str) -> None:
    with pytest.raises(torchgraft.GraftError, match=message):
        composed("bert_sdpa", block)


@functools.cache
def mixed() -> torch.jit.ScriptModule:
    module = bank("bert_sdpa", "bn", "gated", "prefix2", "lora")
    module = torchgraft.compose(module, "two", Parallel("bn", "gated"), verify=False)
    module = torchgraft.compose(module, "stack", Stack("bn", "gated"), verify=False)
    return torchgraft.compose(module, "three", Stack("lora", Parallel("bn", "gated", "bn")))


def test_rows_of_a_mixed_batch() -> None:
    """First all rows with their first child, then those that have a second one, then those with a third one."""
    variant, module = "bert_sdpa", mixed()
    names = [None, "two", "gated", "three", "stack", "two", "prefix2", "three"]
    ids = torch.tensor([-1 if name is None else module.adapter_names().index(name) for name in names])
    batch = make_batch([9, 4, 7, 2, 5, 9, 3, 6], 9, DTYPE, 5)
    blocks = {"two": Parallel("bn", "gated"), "stack": Stack("bn", "gated"),
              "three": Stack("lora", Parallel("bn", "gated", "bn"))}  # fmt: skip
    channels = {"two": 2, "three": 3}
    with torch.no_grad():
        result, gates = module.forward_with_gates(*VARIANTS[variant].arguments(batch), adapter_ids=ids)
    found = VARIANTS[variant].hidden(result)
    order = [
        (row, channel) for channel in range(3) for row, name in enumerate(names) if channels.get(name, 1) > channel
    ]
    assert found.size(0) == len(order)
    for position, (row, channel) in enumerate(order):
        block = None if names[row] is None else blocks.get(names[row], Stack(names[row]))
        wanted, scores = expected(variant, batch.row(row), block)
        assert difference(found[position : position + 1], wanted[channel : channel + 1]) <= TOLERANCE, (row, channel)
    first = {name: layers.get(0, {}) for name, layers in gates.items()}
    counts = {name: gate["output_adapter"].size(0) for name, gate in first.items() if "output_adapter" in gate}
    assert counts == {"gated": 1, "two.gated": 2, "stack.gated": 1, "three.gated": 2}


def test_gates_are_those_of_the_library() -> None:
    block, batch = Parallel("gated", "bn"), make_batch([9, 4], 9, DTYPE, 5)
    module = composed("bert_sdpa", block)
    module.activate("c")
    with torch.no_grad():
        _, gates = module.forward_with_gates(*VARIANTS["bert_sdpa"].arguments(batch))
    _, alone = expected("bert_sdpa", batch, Stack("gated"))
    for layer, locations in alone[saved("bert_sdpa", "gated").name].items():
        for location, gate in locations.items():
            wanted = torch.from_numpy(gate).reshape(2, -1)
            assert difference(gates["c.gated"][layer][location], wanted) <= TOLERANCE


def test_each_child_has_its_own_head() -> None:
    module = bank("bert_sdpa", "bn", "gated")
    for name, labels in (("bn", 2), ("gated", 3)):
        head = torchgraft.HeadConfig(num_labels=labels, layers=1, pooling="mean")
        module = torchgraft.add_head(module, name, head, token_mask="attention_mask")
    module = torchgraft.compose(module, "c", Parallel("bn", "gated"), verify=False)
    batch = make_batch([9, 4, 7], 9, DTYPE, 5)
    arguments = VARIANTS["bert_sdpa"].arguments(batch)
    with torch.no_grad():
        of_bn, of_gated = (module.forward_with_head(*arguments, adapter_ids=torch.full([3], id)) for id in (0, 1))
        module.activate("c")
        assert difference(module.forward_with_head(*arguments).nan_to_num(neginf=-1),
                          torch.cat([of_bn, of_gated]).nan_to_num(neginf=-1)) <= TOLERANCE  # fmt: skip
        found = module.forward_with_head(*arguments, adapter_ids=torch.tensor([1, 2, 0]))
        assert found.size(0) == 4 and difference(found[3:], of_gated[1:2]) <= TOLERANCE
        assert difference(found[1:3, :2], of_bn[1:, :2]) <= TOLERANCE


def test_life_of_a_parallel(tmp_path) -> None:
    block, batch = Parallel("bn", "bn2"), make_batch([9, 4], 9, DTYPE)
    module = composed("bert_sdpa", block, verify=True)
    assert torchgraft.list_adapters(module)[-1].composition == "Parallel(bn, bn2)"
    renamed = reloaded(torchgraft.rename_adapter(module, "bn", "en"))
    renamed.activate("c")
    wanted = expected_states("bert_sdpa", batch, block)
    assert difference(run(renamed, "bert_sdpa", batch), wanted) <= TOLERANCE
    lowered = torchgraft.lower(module)
    lowered.activate("c")
    assert difference(run(lowered, "bert_sdpa", batch), wanted) <= TOLERANCE

    torchgraft.save_adapter_setup(module, "c", tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_setup.json").read_text())["adapter_setup"] == block.to_dict()
    again = torchgraft.load_adapter_setup(base("bert_sdpa", DTYPE), tmp_path / "ours", "again")
    again.activate("again")
    assert difference(run(again, "bert_sdpa", batch), wanted) <= TOLERANCE
    theirs = tmp_path / "theirs"
    oracle_for(VARIANTS["bert_sdpa"], DTYPE).model.save_adapter_setup(str(theirs), library_block("bert_sdpa", block))
    loaded = torchgraft.load_adapter_setup(base("bert_sdpa", DTYPE), theirs)
    loaded.activate("theirs")
    assert difference(run(loaded, "bert_sdpa", batch), wanted) <= TOLERANCE

    without = torchgraft.remove_adapter(module, "c")
    assert str(without.grafted_forward.inlined_graph) == str(
        bank("bert_sdpa", "bn", "bn2").grafted_forward.inlined_graph
    )


def by_hand(variant: str) -> torch.jit.ScriptModule:
    module = torchgraft.graft(base(variant, DTYPE), "double_seq_bn[use_gating=True]", "a")
    module = torchgraft.graft(module, "double_seq_bn", "b")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in module.adapters.state_dict().items():
            if tensor.is_floating_point() and "scaling" not in key and torch.isfinite(tensor).all():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.3)
    return torchgraft.compose(module, "c", Parallel("a", "b"))


@pytest.mark.parametrize("variant", ["encoder_slow_pre_seq_first", "own_post_sdpa"])
@pytest.mark.parametrize("count", [1, 3])
def test_other_models_give_each_child(variant: str, count: int) -> None:
    module = by_hand(variant)
    batch = make_batch([9] * count, 9, DTYPE)
    wanted = [run(module, variant, batch, adapter_ids=torch.full([count], id)) for id in (0, 1)]
    assert difference(*wanted) > 1e-3
    module.activate("c")
    assert difference(run(module, variant, batch), torch.cat(wanted)) <= TOLERANCE
    plain = run(module, variant, batch, adapter_ids=torch.full([count], -1))
    ids = torch.tensor([2, -1, 1][:count])
    found = run(module, variant, batch, adapter_ids=ids)
    rows = [wanted[0][:1], plain[1:2], wanted[1][2:3], wanted[1][:1]]
    assert difference(found, torch.cat([row for row in rows if row.size(0)])) <= TOLERANCE


def rows_of_linear_maps(module: torch.jit.ScriptModule, *arguments: torch.Tensor | None) -> set[int]:
    """How many rows the linear maps of a pass see."""
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        module(*arguments)
    shapes = [event.input_shapes[0] for event in profile.events() if event.name == "aten::linear"]
    return {shape[0] for shape in shapes if len(shape) == 3}


def drawn(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in module.adapters.state_dict().items():
            if tensor.is_floating_point() and "scaling" not in key:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.1)
    return module


class _Layers(torch.nn.Module):
    """Three layers, and a mask of tokens that a caller may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Plain() for _ in range(3))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        kept = torch.ones(x.size(0), x.size(1)) if mask is None else mask
        for layer in self.layers:
            x = layer(x, kept)
        return x


@pytest.mark.parametrize("with_mask", [False, True])
def test_what_lies_under_the_first_adapter_runs_once(with_mask: bool) -> None:
    """Inputs of another kind than the example have the same results."""
    torch.manual_seed(0)
    module = torch.jit.script(_Layers().eval())
    for name in ("a", "b"):
        module = torchgraft.graft(module, "lora[r=4, leave_out=[0, 1]]", name)
    x, mask = torch.randn(2, 5, HIDDEN), torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])
    example = (x, mask) if with_mask else (x,)
    module = torchgraft.compose(drawn(module), "c", Parallel("a", "b"), example=example)
    for count in (1, 2, 5, 6):
        x, mask = torch.randn(count, 5, HIDDEN), (torch.arange(5)[None] < torch.randint(2, 6, (count, 1))).float()
        for arguments in ((x,), (x, mask)):
            with torch.no_grad():
                alone = [module(*arguments, adapter_ids=torch.full([count], id)) for id in (0, 1)]
                found = module(*arguments, adapter_ids=torch.full([count], 2))
            assert difference(alone[0], alone[1]) > 1e-3
            assert difference(found, torch.cat(alone)) <= 1e-5
    module.activate("c")
    x, mask = torch.randn(4, 5, HIDDEN), torch.ones(4, 5)
    assert 4 in rows_of_linear_maps(module, *((x, mask) if with_mask else (x,)))
    assert rows_of_linear_maps(module, *((x,) if with_mask else (x, mask))) == {8}


class _AliasedHead(_Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x, mask)
        head = x[:, 0]
        y = self.layers[2](self.layers[1](x, mask), mask)
        if not bool((mask > 0).all()):
            x += y
        return head + y[:, 0]


class _CountsPadding(_Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        padding = (mask == 0).sum()
        for layer in self.layers:
            x = layer(x, mask)
        return x * (1 + padding / x.size(0))


class _DropsFullMasks(_Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = torch.ones(1, x.size(1))
        if not bool((mask > 0).all()):
            kept = mask
        for layer in self.layers:
            x = layer(x, kept)
        return x


class _OneRowAlone(_Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        alone = x.size(0) == 1
        for layer in self.layers:
            x = layer(x, mask)
        return x[0:1] if alone else x


@pytest.mark.parametrize("model", [_AliasedHead, _CountsPadding, _DropsFullMasks])
@pytest.mark.parametrize("count", [1, 3])
def test_what_the_example_does_not_show_is_right_too(model: type[torch.nn.Module], count: int) -> None:
    """The example's mask is all ones; it is a batch with padding that tells the models from simpler ones."""
    torch.manual_seed(0)
    module = torch.jit.script(model().eval())
    for name in ("a", "b"):
        module = torchgraft.graft(module, "lora[r=4, leave_out=[0]]", name, verify=False)
    example = (torch.randn(3, 5, HIDDEN), torch.ones(3, 5))
    module = torchgraft.compose(drawn(module), "c", Parallel("a", "b"), example=example)
    x, mask = torch.randn(count, 5, HIDDEN), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]).repeat(count, 1)
    with torch.no_grad():
        alone = [module(x, mask, adapter_ids=torch.full([count], id)) for id in (0, 1)]
        assert difference(module(x, mask, adapter_ids=torch.full([count], 2)), torch.cat(alone)) <= 1e-5


class _PositionsFirst(_Layers):
    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h = positions + x
        for layer in self.layers:
            h = layer(h, torch.ones(h.size(0), h.size(1)))
        return h


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_argument_that_broadcasts_over_rows_counts_none(count: int) -> None:
    torch.manual_seed(0)
    module = torch.jit.script(_PositionsFirst().eval())
    for name in ("a", "b"):
        module = torchgraft.graft(module, "lora[r=4]", name, verify=False)
    module = torchgraft.compose(drawn(module), "c", Parallel("a", "b"), verify=False)
    arguments = torch.randn(1, 5, HIDDEN), torch.randn(count, 5, HIDDEN)
    with torch.no_grad():
        alone = torch.cat([module(*arguments, adapter_ids=torch.full([count], id)) for id in (0, 1)])
        module.activate("c")
        if count > 1:
            with pytest.raises(torch.jit.Error, match="whose rows cannot be told"):
                module(*arguments)
        else:
            assert difference(module(*arguments), alone) <= 1e-5


def test_arguments_that_forward_writes_into_are_refused() -> None:
    class Writes(_Layers):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x.mul_(2.0)
            for layer in self.layers:
                x = layer(x, mask)
            return x

    module = torch.jit.script(Writes().eval())
    for name in ("a", "b"):
        module = torchgraft.graft(module, "lora[r=4]", name, verify=False)
    with pytest.raises(torchgraft.GraftError, match="a Parallel repeats the rows .* forward may write into 'x"):
        torchgraft.compose(module, "c", Parallel("a", "b"))


def test_rows_with_one_label_have_no_parallel() -> None:
    module = torchgraft.compose(bank("bert_sdpa", "bn", "bn2"), "c", Parallel("bn", "bn2"), verify=False)
    with pytest.raises(torchgraft.GraftError, match=r"'c', Parallel\(bn, bn2\), has a Parallel"):
        Trainer(module, "c", EncodedExamples([[1], [2]], [[0], [0]], torch.tensor([0, 1]), ["", ""]), None, 2,
                TrainingOptions())  # fmt: skip
