"""MultiTask: equal to `adapters==1.3.0` with set_active_adapters(MultiTask(...)) and task_ids, row by row."""

from pathlib import Path

import adapters.composition as library
import pytest
import torch
from transformers import BertForSequenceClassification

import adapters
import torchgraft
from adapters import LoRAConfig, MTLLoRAConfig, SeqBnConfig
from grafted import base, reloaded
from library_bank import DOUBLE, LibraryBank, hidden
from models import hugging_face, make_batch
from oracle import TOLERANCE, difference
from torchgraft import Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from torchgraft.training.batches import EncodedExamples
from torchgraft.training.options import TrainingOptions
from torchgraft.training.trainer import Trainer

CONFIGS = {
    "a": MTLLoRAConfig(n_up_projection=3, weights_sharpness=0.7, use_gating=True),
    "b": MTLLoRAConfig(r=4),
    "c": MTLLoRAConfig(r=2, n_up_projection=2),
    "lora": LoRAConfig(r=4, alpha=16),
    "wide": MTLLoRAConfig(output_lora=True),
    "ia3": adapters.IA3Config(intermediate_lora=False, attn_matrices=["q", "v"]),
    "bn": SeqBnConfig(reduction_factor=6),
}


def _make_model() -> BertForSequenceClassification:
    plain_model = hugging_face("bert", "sdpa", DOUBLE)
    model = BertForSequenceClassification(plain_model.config).double()
    model.bert.load_state_dict(plain_model.state_dict(), strict=False)
    return model


LIBRARY = LibraryBank(CONFIGS, _make_model, "bert", with_head=False)
TASKS = [2, 0, 1, 0, 1]
BATCH = make_batch([9, 6, 8, 9, 4], 9, DOUBLE)


def library_block(block) -> library.AdapterCompositionBlock:
    children = [child if isinstance(child, str) else library_block(child) for child in block.children]
    return getattr(library, type(block).__name__)(*children, **block.to_dict().get("kwargs", {}))


def by_the_library(block, tasks, model=None) -> torch.Tensor:
    model = model or LIBRARY.model
    model.set_active_adapters(library_block(block))
    with torch.no_grad():
        return model.get_submodule("bert")(BATCH.ids, BATCH.mask, task_ids=tasks)[0]


def run(module: torch.jit.ScriptModule, tasks: list[int], name: str = "tasks") -> torch.Tensor:
    ids = torch.tensor(torchgraft.task_ids(module, name))[tasks]
    with torch.no_grad():
        return hidden(module, BATCH, adapter_ids=ids)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("block", "added"),
    [
        (MultiTask("a", "b", "c"), 0),
        (Stack(MultiTask("a", "b", "c"), "lora"), 3),
        (Stack(MultiTask("a", "b", "c"), MultiTask("b", "lora", "a")), 3),
        (MultiTask("a", Stack("b", "c"), Average("a", "c", weights=[0.25, 0.75])), 2),
        (Stack("lora", MultiTask("a", Stack("b", "c"), "a")), 2),
    ],
    ids=str,
)
def test_rows_of_tasks_equal_the_library(block, added: int) -> None:
    module = torchgraft.compose(LIBRARY.bank, "tasks", block, verify=False)
    names = [f"tasks_{task}" for task in range(3)]
    assert len([name for name in module.adapter_names() if name in names]) == added
    for tasks in (TASKS, [1, 1, 1, 1, 1]):
        wanted = by_the_library(block, torch.tensor(tasks))
        assert difference(run(module, tasks), wanted) <= TOLERANCE[DOUBLE]
    assert difference(run(reloaded(module), TASKS), by_the_library(block, torch.tensor(TASKS))) <= TOLERANCE[DOUBLE]


def test_names_of_tasks_and_shared_matrices_are_the_librarys(tmp_path: Path) -> None:
    """The library's share_parameters(); its task_ids as names; its directory."""
    model = _make_model()
    adapters.init(model)
    for name in ("a", "b", "c"):
        model.load_adapter(str(LIBRARY.directory("b")), load_as=name)
        for part in (part for key, part in model.named_parameters() if f".{name}." in key):
            torch.nn.init.normal_(part, std=0.3)
    block = MultiTask("a", "b", "c")
    model.share_parameters(library_block(block))
    model.double().eval().save_adapter_setup(str(tmp_path / "setup"), library_block(block))
    names = ["c", "a", "b", "a", "b"]
    module = torchgraft.load_adapter_setup(base("bert_sdpa", DOUBLE), tmp_path / "setup", "tasks")
    wanted = by_the_library(block, names, model)
    assert difference(wanted[3], wanted[4]) > 1e-3
    assert difference(run(module, ["abc".index(name) for name in names]), wanted) <= TOLERANCE[DOUBLE]


def test_directories_go_both_ways(tmp_path: Path) -> None:
    block = Stack("lora", MultiTask("a", "b", "c"))
    module = torchgraft.compose(LIBRARY.bank, "tasks", block)
    torchgraft.save_adapter_setup(module, "tasks", tmp_path / "setup")
    again = torchgraft.load_adapter_setup(base("bert_sdpa", DOUBLE), tmp_path / "setup", "tasks")
    wanted = by_the_library(block, torch.tensor(TASKS))
    assert difference(run(again, TASKS), wanted) <= TOLERANCE[DOUBLE]
    model = _make_model()
    adapters.init(model)
    model.load_adapter_setup(str(tmp_path / "setup"), set_active=True, use_safetensors=True)
    assert str(model.active_adapters) == str(library_block(block))
    found = by_the_library(block, torch.tensor(TASKS), model.double().eval())
    assert difference(found, wanted) <= 1e-5  # the library loads into float32


def test_what_has_no_task_is_an_error() -> None:
    module = torchgraft.compose(LIBRARY.bank, "tasks", Stack(MultiTask("a", "c"), "lora"))
    assert torchgraft.task_ids(module, "tasks") == [8, 9]
    listed = {info.name: info.composition for info in torchgraft.list_adapters(module)}
    assert listed["tasks"] == "Stack(MultiTask(a, c), lora)" and listed["tasks_1"] == "Stack(c, lora)"
    message = r"'tasks', Stack\(MultiTask\(a, c\), lora\), needs the task of each row; give adapter_ids, with "
    message += r"8 for Stack\(a, lora\), 9 for Stack\(c, lora\)"
    with pytest.raises(torch.jit.Error, match=message):
        hidden(module, BATCH, adapter_ids=torch.tensor([8, 7, 8, 8, 8]))
    module.activate("tasks")
    run(module, [0, 1, 1, 0, 0])
    with pytest.raises(torch.jit.Error, match=message):
        hidden(module, BATCH)
    more = torchgraft.compose(module, "both", MultiTask("a", "b"))  # the active one stays
    assert more.active_adapter() == "tasks" and torchgraft.task_ids(more, "both") == [0, 1]
    message = "'both', MultiTask\\(a, b\\), .*, with 0 for 'a', 1 for 'b'"
    more.activate("both")
    with pytest.raises(torch.jit.Error, match=message):
        hidden(more, BATCH)
    with pytest.raises(torchgraft.GraftError, match="task_ids: 'tasks_0' is no composition with a MultiTask"):
        torchgraft.task_ids(more, "tasks_0")


def test_life_of_a_composition_with_tasks() -> None:
    module = torchgraft.compose(LIBRARY.bank, "tasks", Stack(MultiTask("a", "c"), "lora"), verify=False)
    with pytest.raises(torchgraft.GraftError, match=r"no composition is Stack\(c, lora\), which is a task of Stack\("):
        torchgraft.remove_adapter(module, "tasks_1")
    with pytest.raises(torchgraft.GraftError, match="the composition 'tasks', .*, uses 'a'"):
        torchgraft.remove_adapter(module, "a")
    wanted = run(module, [0, 1, 1, 0, 1])
    renamed = torchgraft.rename_adapter(torchgraft.rename_adapter(module, "tasks", "t"), "a", "other")
    assert torch.equal(run(torchgraft.remove_adapter(renamed, "bn", "ia3"), [0, 1, 1, 0, 1], "t"), wanted)
    module.activate("tasks")
    for change in (torchgraft.lower, torchgraft.optimize):
        assert difference(run(change(module), [0, 1, 1, 0, 1]), wanted) <= TOLERANCE[DOUBLE]
    again = torchgraft.compose(module, "again", Stack(MultiTask("c", "b"), "lora"), verify=False)
    assert torchgraft.task_ids(again, "again") == [9, 11]  # tasks_1, and one that is new
    left = torchgraft.remove_adapter(module, "tasks", "tasks_0", "tasks_1")
    assert left.adapter_names() == list(CONFIGS)
    with pytest.raises(torchgraft.GraftError, match="has a MultiTask, whose rows need the ids of their tasks"):
        Trainer(
            module,
            "tasks",
            EncodedExamples([[1], [2]], [[0], [0]], torch.tensor([0, 1]), ["", ""]),
            None,
            2,
            TrainingOptions(),
        )


# What the library raises where it refuses; None: it gives wrong rows, or rows that depend on the others'.
REFUSED = [
    (MultiTask("bn", "a"), "MultiTask for LoRAs only, and 'bn' has output_adapter"),
    (MultiTask("a", "wide"), "'wide' and 'a' act in different places"),
    (MultiTask("a", "ia3"), "'ia3' is \\(IA\\)\\^3 or DoRA"),
    (MultiTask("a", Fuse("b", "c")), "Fuse is for bottlenecks"),
    (Stack(Split("a", "b", splits=[4, 5]), MultiTask("a", "b")), "Split is for bottlenecks"),
    (Stack(Parallel("a", "b"), MultiTask("a", "b")), "Parallel and MultiTask both say which rows an adapter gets"),
    (Stack(BatchSplit("a", "b", batch_sizes=[2, 3]), MultiTask("a", "b")), "BatchSplit and MultiTask both say"),
    (Stack(MultiTask("a", "b"), MultiTask("a", "b", "c")), "MultiTask blocks with different numbers of children"),
    (MultiTask("a", MultiTask("b", "c")), "the adapters library cannot nest MultiTask\\(b, c\\) inside MultiTask"),
    (Average("a", MultiTask("b", "c")), "the adapters library cannot nest MultiTask\\(b, c\\) inside Average"),
]


@pytest.mark.parametrize(("block", "message"), REFUSED, ids=str)
def test_what_tasks_cannot_have_is_refused(block, message: str) -> None:
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.compose(LIBRARY.bank, "tasks", block)


@pytest.mark.parametrize("block", [MultiTask("a", "wide"), MultiTask("bn", "a"), MultiTask("a", Fuse("b", "c"))])
def test_the_library_cannot_run_them_either(block) -> None:
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        by_the_library(block, torch.tensor([0, 1, 1, 0, 1]))


def test_verified_without_an_example() -> None:
    module = torchgraft.compose(reloaded(LIBRARY.bank), "tasks", MultiTask("a", Stack("b", "c")))
    assert module.adapter_names()[-2:] == ["tasks", "tasks_1"]
    module.activate("tasks")
    assert torchgraft.verify(module) == []
