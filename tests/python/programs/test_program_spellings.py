"""Spellings that a program or a module may have, and what they mean: equal on the way in and out, or refused."""

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from oracle import difference
from torchgraft.programs.load_program import load_program
from torchgraft.programs.read_program import quiet


def as_script(model: nn.Module, *inputs: Tensor) -> torch.jit.ScriptModule:
    with quiet():
        return torchgraft.from_program(torch.export.export(model.eval(), inputs))


class Autocast(nn.Module):
    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.linear, self.enabled = nn.Linear(4, 4), enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.linear(x)


def test_a_part_under_autocast_is_refused_and_one_without_is_taken() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(torchgraft.GraftError, match=r"under torch.autocast\('cpu', torch.bfloat16\), whose casts"):
        as_script(Autocast(True), x)
    model = Autocast(False)
    assert torch.equal(as_script(model, x)(x), model(x))


class WrittenConstant(nn.Module):
    """A constant that is one number at the start and another after a write."""

    def forward(self, x: Tensor) -> Tensor:
        factor = torch.tensor(2.0)
        factor.view(1).add_(x.sum())
        return x * factor


def test_a_constant_that_is_written_is_no_number() -> None:
    model, x = WrittenConstant(), torch.randn(2, 4)
    script = as_script(model, x)
    for _ in range(2):  # nor does a write last
        assert difference(script(x), model(x)) <= 1e-6


class Appending(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for i in range(2):
            parts.append(x + i)
        return torch.cat(parts, 1)


class WritingUnlessRefused(nn.Module):
    """The write stands in the other block of a check."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        if bool((x <= 1e9).all()):
            x.add_(1)
        else:
            raise ValueError("too large")
        return x


class Dtypes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor(0.1, dtype=torch.float64) + torch.tensor([1.0, 2.0], dtype=torch.float64)


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(2, dtype=torch.int64) / torch.tensor(3, dtype=torch.float64) + x


@pytest.mark.parametrize("model", [Appending(), Dtypes(), Whole()], ids=lambda model: type(model).__name__)
def test_a_script_and_its_program_give_the_same(model: nn.Module) -> None:
    script, x = torch.jit.script(model), torch.randn(3, 2)
    with quiet():
        actual = torchgraft.export(script, torch.randn(4, 2)).module()(x)
    assert actual.dtype == script(x).dtype
    assert difference(actual, script(x)) <= 1e-12


def test_a_check_that_also_writes_is_not_dropped() -> None:
    script = torch.jit.script(WritingUnlessRefused())
    with pytest.raises(torchgraft.GraftError, match="a program cannot branch on what tensors hold"):
        torchgraft.export(script, torch.randn(2, 3))


class Joined(nn.Module):
    def forward(self, *arguments: Tensor) -> Tensor:
        return arguments[0] + 2 * arguments[1] + 3 * arguments[2]


@pytest.mark.parametrize("name", ["x", "x1", "x_1"])
def test_arguments_of_one_name_are_told_apart(name: str) -> None:
    inputs = tuple(torch.randn(2, 3) for _ in range(3))
    traced = torch.jit.trace(Joined(), inputs)
    for value in list(traced.graph.inputs())[1:]:
        value.setDebugName(name)
    with quiet():
        program = torchgraft.export(traced, inputs).module()
    assert difference(program(*inputs), traced(*inputs)) <= 1e-6


def _beside(name: str) -> list[str]:
    return [name, "serialized_state_dict.pt"] if name.endswith("model.json") else [name]


def _elsewhere(name: str) -> list[str]:
    return [name, "other/" + name.partition("/")[2]] if name.endswith("model.json") else [name]


def _in_capitals(name: str) -> list[str]:
    return [name, name.replace("model.json", "MODEL.json")] if name.endswith("model.json") else [name]


@pytest.mark.parametrize("members", [_beside, _elsewhere, _in_capitals])
def test_a_file_that_is_more_than_one_folder_is_refused(members, tmp_path: Path) -> None:
    whole, changed = tmp_path / "whole.pt2", tmp_path / "changed.pt2"
    with quiet():
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),)), whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            for written in members(name):
                new.writestr(written, old.read(name))
    load_program(whole)
    with pytest.raises(torchgraft.GraftError, match="expected the one folder that torch.export.save"):
        load_program(changed)
