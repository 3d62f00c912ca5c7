#!/usr/bin/env python3
"""Accuracy of the demo's adapters, which were trained on float32, on the int8 base.

    .venv/bin/python examples/sentiment/int8.py      # a minute

loads the adapters of examples/sentiment/adapters, quantises the grafted module with all linear maps, and with all but
the feed-forward blocks' last ones, and classifies the test sentences of each adapter's domain, which no training saw.
"""

from __future__ import annotations

import sys
import tarfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))
warnings.filterwarnings("ignore")  # torch warns dozens of times that torch.jit is deprecated

import torch  # noqa: E402

import torchgraft  # noqa: E402
from data import LABELS, DataError, prepare  # noqa: E402
from torchgraft.training import EncodedExamples, encode_examples, read_examples  # noqa: E402
from torchgraft.training.batches import collate, scoring_batches  # noqa: E402
from torchgraft.training.trainer import class_scores  # noqa: E402
from traced_encoder import tokenizer, traced_encoder  # noqa: E402

ADAPTERS = ROOT / "examples" / "sentiment" / "adapters"
KINDS = {"int8": [], "int8 but `ffn_out`": ["ffn_out"]}  # what stays in float32


def predictions(module: torch.jit.ScriptModule, examples: EncodedExamples) -> torch.Tensor:
    """The class of each example, [examples]."""
    found = torch.empty(len(examples), dtype=torch.int64)
    with torch.inference_mode():
        for indices in scoring_batches(examples.lengths(), 64):
            batch = collate(examples, indices, slice(None), torch.device("cpu"))
            found[indices] = class_scores(module, batch).argmax(1)
    return found


def row(domain: str, base: torch.jit.ScriptModule, examples: EncodedExamples) -> str:
    module = torchgraft.load_adapter(base, ADAPTERS / domain, verify=False)
    in_float32 = predictions(module, examples)
    cells = [domain, str(len(examples)), f"{(in_float32 == examples.labels).double().mean():.3f}"]
    for skip in KINDS.values():
        found = predictions(torchgraft.quantize(module, skip=skip), examples)
        accuracy = (found == examples.labels).double().mean()
        cells += [f"{accuracy:.3f}", f"{(found == in_float32).double().mean():.3f}"]
    return "| " + " | ".join(cells) + " |"


def run() -> None:
    paths, base, encode = prepare(ROOT / "build" / "sentiment" / "data"), traced_encoder(), tokenizer()
    columns = [name for kind in KINDS for name in (kind, "same class")]
    print("| adapter | test sentences | float32 | " + " | ".join(columns) + " |")
    print("|---" * (3 + len(columns)) + "|")
    for folder in sorted(ADAPTERS.iterdir()):
        if folder.is_dir():
            examples = encode_examples(encode, read_examples(paths[folder.name]["test"]), LABELS)
            print(row(folder.name, base, examples), flush=True)


def main() -> int:
    try:
        run()
        return 0
    except (DataError, OSError, tarfile.TarError, torchgraft.GraftError) as error:
        print("int8: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
