"""A new user types every command that README.md and docs/ show, in order, in a folder with the files that they name."""

import csv
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from torch import Tensor, nn

import torchgraft
from hosts_support import ROOT

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "film", "lovely", "dreadful", "warm", "cold", "story", "and"]
PROGRAMS = {
    "torchgraft ": "graft.py",
    ".venv/bin/python scripts/graft.py ": "graft.py",
    ".venv/bin/python scripts/train.py ": "train.py",
}
# Lines that leave something to the reader, or that take minutes by design.
NOT_RUN = {
    "torchgraft tune -o kernels.json": "measures for minutes; test_tuning.py runs it",
    "torchgraft serve base.pt --adapters FOLDER --tokenizer tokenizer.json --port 8080 -- --capacity 64": "goes on "
    "until a signal ends it; test_text_front.py runs it",
}


class _Encoder(nn.Module):
    """Pre-norm, with RMSNorm, a gated feed-forward block, packed projections and learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(len(WORDS), 48), nn.Embedding(40, 48)
        self.norms = nn.ModuleList([nn.RMSNorm(48) for _ in range(4)])
        self.packed = nn.ModuleList([nn.Linear(48, 144) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(48, 48) for _ in range(2)])
        self.gate, self.up = (nn.ModuleList([nn.Linear(48, 80) for _ in range(2)]) for _ in range(2))
        self.down = nn.ModuleList([nn.Linear(80, 48) for _ in range(2)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        tokens = torch.arange(input_ids.size(1))
        x = self.words(input_ids) + self.positions(tokens)
        visible = attention_mask.bool()[:, None, None]
        for i in range(2):
            parts = self.packed[i](self.norms[2 * i](x)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (6, 8)).transpose(1, 2) for part in parts)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, visible)
            x = x + self.out[i](mixed.transpose(1, 2).flatten(2))
            y = self.norms[2 * i + 1](x)
            x = x + self.down[i](nn.functional.silu(self.gate[i](y)) * self.up[i](y))
        return (x,)


def shown_by(document: Path) -> list[str]:
    """The command lines of a document's blocks, indented or fenced, without comments."""
    result, is_fenced = [], False
    for line in document.read_text().replace("\\\n", "").splitlines():
        is_fenced ^= line.startswith("```")
        command = re.sub(r" +", " ", re.sub(r"\s+#.*", "", line.strip()))
        if (is_fenced or line.startswith("    ")) and command.startswith(tuple(PROGRAMS)):
            result.append(command)
    return result


DOCUMENTS = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if shown_by(path)]


def prepare(folder: Path) -> None:
    """BASE.pt and BASE.pt2; MODEL.pt with NAME, which DIRECTORY and FOLDER/NAME hold, too; texts and a tokenizer."""
    torch.manual_seed(0)
    encoder = _Encoder().eval()
    example = torch.tensor([[2, 4, 5, 3], [2, 6, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    base = torch.jit.trace(encoder, example, check_trace=False)
    base.save(str(folder / "BASE.pt"))
    dynamic = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", max=40)}
    program = torch.export.export(encoder, example, dynamic_shapes=(dynamic, dynamic))
    torch.export.save(program, str(folder / "BASE.pt2"))
    model = torchgraft.graft(base, "unipelt", "NAME")
    model.save(str(folder / "MODEL.pt"))
    for directory in (folder / "DIRECTORY", folder / "FOLDER/NAME"):
        torchgraft.save_adapter(model, "NAME", directory)
    torch.save(example, folder / "INPUTS.pt")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for name in ("tokenizer.json", "TOKENIZER.json"):
        tokenizer.save(str(folder / name))
    (folder / "texts.txt").write_text("a lovely film\na cold story\n")
    with (folder / "reviews.csv").open("w", newline="") as file:
        told = zip(
            range(40), itertools.cycle([("warm and lovely", "good"), ("cold and dreadful", "bad")]), strict=False
        )
        csv.writer(file).writerows([("text", "label"), *(row for _, row in told)])


def run_line(line: str, folder: Path) -> None:
    """Runs a line as a process, and checks what it promises: status 0, its files, nothing but warnings on stderr."""
    program = next(text for text in PROGRAMS if line.startswith(text))
    words = shlex.split(line.removeprefix(program))
    printed = words[words.index(">") + 1] if ">" in words else None
    arguments = words[: words.index(">")] if printed else words
    command = [sys.executable, ROOT / "scripts" / PROGRAMS[program], *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    trains = PROGRAMS[program] == "train.py" or arguments[0] == "train"  # which tells of its epochs
    assert trains or all(text.startswith("warning: ") for text in done.stderr.splitlines())
    if printed:
        (folder / printed).write_text(done.stdout)
    for option in ("-o", "--svg", "--aoti", "--onnx"):
        if option in arguments:
            assert (folder / arguments[arguments.index(option) + 1]).exists(), line


@pytest.mark.slow(seconds=240)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_what_a_document_shows_can_be_typed(document: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    if any("--onnx" in line for line in shown_by(document)):
        pytest.importorskip("onnx", reason="requirements/onnx.txt is not installed")
    for line in shown_by(document):
        if line not in NOT_RUN:
            run_line(line, tmp_path)


def test_every_block_of_commands_is_walked() -> None:
    """Lines that are not run are in the documents; and the README is among what is walked."""
    lines = [line for document in DOCUMENTS for line in shown_by(document)]
    assert set(NOT_RUN) <= set(lines) and len(lines) >= 20
    assert (ROOT / "README.md") in DOCUMENTS
