"""One model of the library with an adapter of each configuration, and the grafted module that holds all of them. Tests
of methods call its checks."""

import json
import tempfile
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapters
import torchgraft
from grafted import base, reloaded
from models import VARIANTS, Batch, make_batch
from oracle import TOLERANCE, difference, randomise, varied_batches

DOUBLE = torch.float64
VARIANT = VARIANTS["bert_sdpa"]


def plain() -> torch.jit.ScriptModule:
    return base("bert_sdpa", DOUBLE)


def hidden(module: torch.jit.ScriptModule, batch: Batch, **options: Any) -> Tensor:
    return VARIANT.hidden(module(*VARIANT.arguments(batch), **options))


class LibraryBank:
    """All in float64, on the model `bert_sdpa`.

    Args:
        configs: the library's, by the adapter's name.
        make_model: makes a model of the library without adapters.
        encoder: the name of the model's submodule that gives hidden states; "": the model itself.
        saving: further arguments of the library's save_adapter().
    """

    def __init__(
        self, configs: dict[str, adapters.AdapterConfig], make_model: Callable[[], nn.Module], encoder: str = "",
        **saving: Any,
    ):  # fmt: skip
        self.configs, self._make_model, self._encoder, self._saving = configs, make_model, encoder, saving
        self._directories: dict[str, Path] = {}

    @cached_property
    def model(self) -> nn.Module:
        model = self._make_model()
        adapters.init(model)
        for seed, (name, config) in enumerate(self.configs.items()):
            model.add_adapter(name, config=config)
            model.double()
            randomise(model, name, seed)
        return model.eval()

    @cached_property
    def bank(self) -> torch.jit.ScriptModule:
        return torchgraft.graft(plain(), adapters={name: self.directory(name) for name in self.configs})

    def directory(self, name: str) -> Path:
        if name not in self._directories:
            folder = Path(tempfile.mkdtemp(prefix="torchgraft_bank_")) / name
            self.model.save_adapter(str(folder), name, **self._saving)
            self._directories[name] = folder
        return self._directories[name]

    def expected(self, name: str | None, batch: Batch) -> Tensor:
        self.model.set_active_adapters(name)
        return self.model.get_submodule(self._encoder)(batch.ids, batch.mask)[0]

    @torch.no_grad()
    def check_alone(self, name: str) -> torch.jit.ScriptModule:
        """The adapter alone is the library's, also in a module that was saved and loaded."""
        module = torchgraft.graft(plain(), adapters={"task": self.directory(name)})
        for batch in varied_batches(VARIANT, DOUBLE):
            assert difference(hidden(module, batch), self.expected(name, batch)) <= TOLERANCE[DOUBLE]
            assert difference(hidden(reloaded(module), batch), self.expected(name, batch)) <= TOLERANCE[DOUBLE]
        return module

    @torch.no_grad()
    def check_rows(self, module: torch.jit.ScriptModule) -> None:
        """Each row of a batch of all adapters and the base is the library's for that row."""
        rows = [None, *self.configs, None]
        batch = make_batch([9 - i % 5 for i in range(len(rows))], 9, DOUBLE)
        ids = torch.tensor([-1 if name is None else self.bank.adapter_names().index(name) for name in rows])
        found = hidden(module, batch, adapter_ids=ids)
        for row, name in enumerate(rows):
            apart = difference(found[row : row + 1], self.expected(name, batch.row(row)))
            assert apart <= TOLERANCE[DOUBLE], f"row {row} ({name}) differs by {apart}"

    def check_written(self, name: str, folder: Path, **loading: Any) -> None:
        """An adapter that was loaded is saved bit for bit."""
        module = torchgraft.load_adapter(plain(), self.directory(name), name, **loading)
        torchgraft.save_adapter(module, name, folder)
        theirs = torch.load(self.directory(name) / "pytorch_adapter.bin", weights_only=True)
        theirs = {key.removeprefix(f"{self._encoder}."): value for key, value in theirs.items()}
        ours = load_file(folder / "adapter.safetensors")
        assert sorted(ours) == sorted(theirs)
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
        files = (path / "adapter_config.json" for path in (folder, self.directory(name)))
        written, read = (json.loads(file.read_text()) for file in files)
        assert adapters.AdapterConfig.load(written["config"]) == adapters.AdapterConfig.load(read["config"])

    def check_gradients(self, name: str, compared: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Gradients are the library's. `compared`: what of a parameter is compared."""
        module = torchgraft.load_adapter(plain(), self.directory(name), "task", trainable=True)
        named = torchgraft.trainable_parameters(module, "task")
        batch = make_batch([7, 4], 7, DOUBLE)
        output = hidden(module, batch)
        weights = torch.randn(output.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(8))
        ours = torch.autograd.grad((output * weights).sum(), [*named.values()])
        model = self.model
        model.train_adapter(name)
        theirs = {key: value for key, value in model.named_parameters() if f".{name}." in key and value.requires_grad}
        model.eval()
        gradients = torch.autograd.grad((self.expected(name, batch) * weights).sum(), [*theirs.values()])
        found = set()
        for (key, value), gradient in zip(theirs.items(), gradients, strict=True):
            pairs = [(mine, grad) for (mine, parameter), grad in zip(named.items(), ours, strict=True)
                     if torch.equal(compared(parameter), compared(value))]  # fmt: skip
            assert len(pairs) == 1, key
            found.add(pairs[0][0])
            mine = compared(pairs[0][1])
            torch.testing.assert_close(mine, compared(gradient), rtol=1e-9, atol=1e-10, msg=key)
        assert found == set(named)

    @torch.no_grad()
    def check_pool(self, names: Iterable[str], room: str) -> None:
        """Rows of a pool are the library's, also those that are written over."""
        names = [*names]
        pool = torchgraft.AdapterPool(plain(), capacity=8, room=[room])
        batch = make_batch([9] * len(names), 9, DOUBLE)
        for _ in range(2):
            for name in names:
                pool.insert(name, self.directory(name))
            with pool.acquire([*names]) as lease:
                found = hidden(lease.module, batch, adapter_ids=lease.ids)
                for row, name in enumerate(names):
                    wanted = self.expected(name, batch.row(row))
                    assert difference(found[row : row + 1], wanted) <= TOLERANCE[DOUBLE], name


def check_learner(module: torch.jit.ScriptModule, own: int, least: float, **options: Any) -> Callable:
    """A step of AdamW on the adapter "learner", whose id is `own`, moves its result by more than `least`, and no other
    adapter's. Returns a check: another module's adapter of this id gives the same as this one after the step."""
    batch = make_batch([9, 6], 9, DOUBLE)

    @torch.no_grad()
    def result(of: torch.jit.ScriptModule, number: int) -> Tensor:
        return hidden(of, batch, adapter_ids=torch.full((2,), number))

    before = [result(module, number) for number in range(-1, own + 1)]
    optimizer = torch.optim.AdamW([*torchgraft.trainable_parameters(module, "learner").values()], lr=0.01, **options)
    hidden(module, batch, adapter_ids=torch.tensor([own, 0])).square().sum().backward()
    optimizer.step()
    after = [result(module, number) for number in range(-1, own + 1)]
    assert all(torch.equal(before[i], after[i]) for i in range(own + 1))
    assert (before[-1] - after[-1]).abs().max() > least

    def check_same(other: torch.jit.ScriptModule) -> None:
        assert difference(result(other, own), after[-1]) <= TOLERANCE[DOUBLE]

    return check_same


@torch.no_grad()
def check_exported(bank: torch.jit.ScriptModule, ids: list[int]) -> None:
    """A program of the bank gives what the bank gives, at another size than it was exported with."""
    batch = make_batch([9, 6, 8, 4], 9, DOUBLE)
    program = torchgraft.export(bank, VARIANT.arguments(make_batch([7, 7], 7, DOUBLE)))
    found = VARIANT.hidden(program.module()(*VARIANT.arguments(batch), torch.tensor(ids)))
    assert difference(found, hidden(bank, batch, adapter_ids=torch.tensor(ids))) <= TOLERANCE[DOUBLE]
