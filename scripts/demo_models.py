"""The encoder, the oracle's adapters, and one batch through each implementation, for scripts/demo.py."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerBase

import adapters

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "sentiment"))

from traced_encoder import HiddenStates, encoder_folder  # noqa: E402

# The oracle's names of the two unions, and whether they have gates. The adapters here have the same names.
GATED = {"unipelt": True, "mam": False}

Gates = dict[
    str, dict[tuple[int, str], Tensor]
]  # [adapter][layer, location]: [rows that use the adapter, gates at the location]


class DemoError(Exception):
    """The demonstration cannot go on. The message is shown as one line."""


@dataclass(frozen=True)
class Batch:
    """Arguments of a grafted model. ids, mask: int64 [B, S] (mask 1 = real token); adapter_ids: int64 [B], or None."""

    ids: Tensor
    mask: Tensor
    adapter_ids: Tensor | None = None

    def mixed(self, adapters_in_use: int) -> Batch:
        """Returns a batch whose rows use the adapters and the base model (-1) in turn."""
        rows = torch.arange(self.ids.size(0)) % (adapters_in_use + 1)
        return Batch(self.ids, self.mask, torch.where(rows == adapters_in_use, -1, rows))


@dataclass(frozen=True)
class Run:
    """The result of one implementation for a batch. hidden: floating, [B, S, H]."""

    hidden: Tensor
    gates: Gates
    milliseconds: list[float] = field(default_factory=list)


def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(encoder_folder()), local_files_only=True)


def load_encoder() -> BertModel:
    return BertModel.from_pretrained(str(encoder_folder()), local_files_only=True).eval()


def trace_encoder(batch: Batch, dtype: torch.dtype) -> torch.jit.ScriptModule:
    """Traces the encoder as somebody would who knows nothing of adapters."""
    # Two rows, not all: if the trace kept the size of its batch, other batches would fail.
    example = (batch.ids[:2], batch.mask[:2])
    return torch.jit.trace(HiddenStates(load_encoder().to(dtype)), example, check_trace=False)


class Oracle:
    """The encoder with adapters of the `adapters` library, eager."""

    def __init__(self, folder: Path):
        """Makes adapters with random weights, none of them zero, and saves each in its own folder below `folder`."""
        self.model = load_encoder()
        adapters.init(self.model)
        torch.manual_seed(0)
        for name in GATED:
            self.model.add_adapter(name, config=name)
            self._add_noise(name)
            self.model.save_adapter(str(folder / name), name)
        self.model.eval()

    @torch.no_grad()
    def _add_noise(self, name: str) -> None:
        done = set()  # parameters that have noise: the layers share the MLP of their prefixes
        for modules in self.model.get_adapter(name).values():
            for parameter in (parameter for module in modules.values() for parameter in module.parameters()):
                if id(parameter) not in done:
                    done.add(id(parameter))
                    scale = 0.005 if parameter.dim() > 1 else 0.05
                    parameter.add_(torch.randn(parameter.shape) * scale)

    def activate(self, name: str | None) -> None:
        self.model.set_active_adapters(name)

    def hidden(self, batch: Batch) -> Tensor:
        return self.model(batch.ids, batch.mask).last_hidden_state

    def run(self, batch: Batch, name: str | None) -> Run:
        """Runs every row with the adapter `name`, or, if that is None, with the base model."""
        self.activate(name)
        if name is None:
            return Run(self.hidden(batch), {})
        output = self.model(batch.ids, batch.mask, output_adapter_gating_scores=True)
        gates: Gates = {name: {}}
        # Modules without a gate report scores, too, but these are other intermediate values.
        for layer, locations in output.adapter_gating_scores[name].items() if GATED[name] else ():
            for location, values in locations.items():
                scores = torch.as_tensor(values, dtype=torch.float64)
                gates[name][layer, location] = scores.reshape(batch.ids.size(0), -1)
        return Run(output.last_hidden_state, gates)

    def run_mixed(self, batch: Batch, names: list[str]) -> Run:
        """Runs each row with its own adapter. The batch's adapter_ids are positions in `names`."""
        hidden = torch.empty_like(self.run(batch, None).hidden)
        gates: Gates = {}
        for index, name in [(-1, None), *enumerate(names)]:
            run, rows = self.run(batch, name), batch.adapter_ids == index
            hidden[rows] = run.hidden[rows]
            for adapter, values in run.gates.items():
                gates[adapter] = {key: value[rows] for key, value in values.items()}
        return Run(hidden, gates)


def _flat_gates(gates: dict) -> Gates:
    """Converts gates[adapter][layer][location], the form of a grafted model and of the C++ program."""
    return {
        adapter: {
            (int(layer), location): torch.as_tensor(values, dtype=torch.float64)
            for layer, locations in layers.items()
            for location, values in locations.items()
        }
        for adapter, layers in gates.items()
    }


def run_python(model: torch.jit.ScriptModule, batch: Batch) -> Run:
    """Runs a grafted model, or its base, in this process."""
    if not hasattr(model, "forward_with_gates"):
        return Run(model(batch.ids, batch.mask), {})
    hidden, gates = model.forward_with_gates(batch.ids, batch.mask, adapter_ids=batch.adapter_ids)
    return Run(hidden, _flat_gates(gates))


def run_cpp(serve: Path, model: Path, batch: Batch, output: Path, repeat: int) -> Run:
    """Runs the program examples/serve on a file, with as many threads as this process has."""
    inputs = output.with_suffix(".inputs.json")
    inputs.write_text(json.dumps({"inputs": [batch.ids.tolist(), batch.mask.tolist()], "dtypes": ["int64", "int64"]}))
    command = [serve, model, inputs, "--output", output, "--repeat", repeat, "--threads", torch.get_num_threads()]
    if batch.adapter_ids is not None:
        command.append("--adapter-ids=" + ",".join(map(str, batch.adapter_ids.tolist())))
    run_program(command)
    report = json.loads(output.read_text())
    hidden = torch.tensor(report["output"]["values"], dtype=torch.float64).reshape(report["output"]["shape"])
    gates = _flat_gates({adapter: entry["layers"] for adapter, entry in report["gates"].items()})
    return Run(hidden, gates, report["milliseconds"])


def run_program(command: list) -> str:
    """Runs a program and returns its output.

    Raises:
        DemoError: the program fails. The message holds what it wrote to stderr.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DemoError(f"{words[0]}: {error}") from error
    if done.returncode != 0:
        raise DemoError(f"'{' '.join(words)}' failed: {done.stderr.strip()}")
    return done.stdout


def output_difference(a: Run, b: Run, tokens: Tensor) -> float:
    """Returns the largest difference of hidden states. tokens: bool [B, S], the tokens to compare."""
    return (a.hidden[tokens] - b.hidden[tokens]).abs().max().item()


def gate_difference(a: Run, b: Run) -> float | None:
    """Returns the largest difference of gates: None if there are none, infinite if one side has gates that the other
    lacks."""
    first, second = (
        {(name, *key): values for name, gates in run.gates.items() for key, values in gates.items()} for run in (a, b)
    )
    if {key: value.shape for key, value in first.items()} != {key: value.shape for key, value in second.items()}:
        return float("inf")
    return max(((first[key] - second[key]).abs().max().item() for key in first), default=None)


def milliseconds(function) -> float:
    """Measures one call."""
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1e3
