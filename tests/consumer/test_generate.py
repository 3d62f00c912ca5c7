"""examples/generate: the same tokens as a loop in Python, from a process without Python."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torchgraft
from decoder_support import HEADS, HIDDEN, POSITIONS, CountingDecoder, Decoder
from hosts_support import attempt, run

FORM = ("--heads", HEADS, "--head-size", HIDDEN // HEADS)
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.pt, grafted.pt (adapters "first": UniPELT, "second": LoRA) and prompts.json."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = torch.jit.script(Decoder().eval())
    grafted = torchgraft.graft(base, config="unipelt", name="first")
    grafted = torchgraft.graft(grafted, config="lora", name="second")
    with torch.no_grad():  # fresh adapters would change little
        for parameter in grafted.adapters.parameters():
            if parameter.isfinite().all() and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter))
    base.save(folder / "base.pt")
    grafted.save(folder / "grafted.pt")
    (folder / "prompts.json").write_text(json.dumps({"prompts": PROMPTS}))
    return folder


def generated(program: Path, folder: Path, tmp_path: Path, *options, model: str = "grafted.pt") -> list[list[int]]:
    output = tmp_path / "tokens.json"
    run(program, folder / model, folder / "prompts.json", *FORM, "--output", output, *options)
    return json.loads(output.read_text())["tokens"]


@torch.inference_mode()
def greedy(folder: Path, prompt: list[int], adapter: int, count: int, model: str = "grafted.pt") -> list[int]:
    """One sequence alone, without padding: the prompt in one pass, then token by token."""
    module = torch.jit.load(folder / model)
    named = {"adapter_ids": torch.tensor([adapter])} if model == "grafted.pt" else {}
    past = (torch.zeros(1, HEADS, 0, HIDDEN // HEADS),) * 2
    ids, tokens = torch.tensor([prompt]), []
    for _ in range(count):
        size, total = ids.size(1), past[0].size(2) + ids.size(1)
        mask = torch.full((total, total), -1e30).triu(1)[-size:][None, None]
        logits, past = module(ids, mask, torch.arange(total - size, total)[None], past, **named)
        tokens.append(int(logits[0, -1].argmax()))
        ids = torch.tensor([tokens[-1:]])
    return tokens


def test_each_sequence_has_its_own_adapter(generate: Path, folder: Path, tmp_path: Path) -> None:
    found = generated(generate, folder, tmp_path, "--adapter-ids", "1,-1,1", "--max-new-tokens", 12)
    expected = [greedy(folder, prompt, adapter, 12) for prompt, adapter in zip(PROMPTS, [1, -1, 1], strict=True)]
    assert found == expected
    assert found[1] == greedy(folder, PROMPTS[1], -1, 12, model="base.pt")
    without = [greedy(folder, prompt, -1, 12) for prompt in PROMPTS]
    assert found[0] != without[0] and found[2] != without[2]  # the adapter changes what is written


@pytest.mark.parametrize("options", [(), ("--num-beams", 2)], ids=["greedy", "beams"])
def test_the_last_token_needs_no_position(generate: Path, folder: Path, tmp_path: Path, options: tuple) -> None:
    """The longest prompt has four tokens: 21 new ones fill the model's 24 positions. One more is an error below."""
    options += ("--adapter", "second", "--max-new-tokens", 21, "--max-positions", POSITIONS)
    found = generated(generate, folder, tmp_path, *options)
    assert [len(row) for row in found] == [21] * len(PROMPTS)
    if "--num-beams" not in options:
        assert found == [greedy(folder, prompt, 1, 21) for prompt in PROMPTS]


def test_base_model(generate: Path, folder: Path, tmp_path: Path) -> None:
    found = generated(generate, folder, tmp_path, "--max-new-tokens", 6, model="base.pt")
    assert found == [greedy(folder, prompt, -1, 6, model="base.pt") for prompt in PROMPTS]


def test_stop_tokens_end_a_sequence_and_streaming_shows_each_token(
    generate: Path, folder: Path, tmp_path: Path
) -> None:
    whole = generated(generate, folder, tmp_path, "--adapter", "second", "--max-new-tokens", 10)
    stop = whole[0][4]
    command = (generate, folder / "grafted.pt", folder / "prompts.json", *FORM, "--adapter", "second")
    printed = run(*command, "--max-new-tokens", 10, "--stop", stop, "--stream").stdout.split("\n")[:-1]
    for row, tokens in enumerate(whole):
        expected = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert [int(line.split()[1]) for line in printed if line.startswith(f"{row} ")] == expected


def test_a_seed_gives_the_same_tokens_and_top_k_1_the_likeliest(generate: Path, folder: Path, tmp_path: Path) -> None:
    options = ("--sample", "--top-k", 5, "--top-p", 0.9, "--temperature", 1.5, "--max-new-tokens", 8)
    first = generated(generate, folder, tmp_path, *options, "--seed", 3)
    assert first == generated(generate, folder, tmp_path, *options, "--seed", 3)
    assert first != generated(generate, folder, tmp_path, *options, "--seed", 4)
    likeliest = generated(generate, folder, tmp_path, "--max-new-tokens", 8)
    assert generated(generate, folder, tmp_path, "--sample", "--top-k", 1, "--max-new-tokens", 8) == likeliest
    assert generated(generate, folder, tmp_path, "--sample", "--top-p", 1e-9, "--max-new-tokens", 8) == likeliest


@pytest.mark.parametrize(
    ("model", "prompts", "options", "message"),
    [
        ("missing.pt", None, [], "missing.pt: no such file"),
        ("prompts.json", None, [], "not a TorchScript file"),
        ("grafted.pt", "{", [], "not JSON"),
        ("grafted.pt", '{"prompts": [[]]}', [], "prompts[0]: expected a list of at least one token id"),
        ("grafted.pt", '{"prompts": [[1], [2.5]]}', [], "prompts[1]: expected token ids of at least 0, got 2.5"),
        ("grafted.pt", '{"prompts": [[1], [-2]]}', [], "got -2"),
        ("grafted.pt", '{"prompts": [[99]]}', [], "index out of range"),
        ("grafted.pt", None, ["--adapter-ids", "0"], "expected one adapter id for each of the 3 prompts, got 1"),
        ("grafted.pt", None, ["--adapter-ids", "0,5,0"], "adapter_ids"),
        ("grafted.pt", None, ["--adapter", "third"], "third"),
        ("base.pt", None, ["--adapter", "first"], "the model has no adapters"),
        ("grafted.pt", None, ["--heads", "3"], "forward fails on ids [3, 4] behind 0 earlier tokens"),
        ("grafted.pt", None, ["--head-size", "9"], "forward fails on ids [3, 4] behind 0 earlier tokens"),
        ("grafted.pt", None, ["--max-positions", "22"], "at most 22 tokens, which the model has positions for"),
        ("grafted.pt", None, ["--max-positions", "22", "--num-beams", "2"], "expected at most 22 tokens"),
        ("grafted.pt", None, ["--max-new-tokens", "22"], "index out of range"),
        ("grafted.pt", None, ["--top-k", "5"], "--top-k"),
        ("grafted.pt", None, ["--nosuch", "5"], "(generate --help)"),
        ("grafted.pt", None, ["--temperature", "0"], "--temperature: expected a number above 0, got 0 ("),
        ("grafted.pt", None, ["--top-p", "nan"], "--top-p: expected a number from 1e-09 to 1, got nan ("),
        ("grafted.pt", None, ["--stop", "2,-3"], "--stop: expected an integer from 0, got -3 ("),
    ],
)
def test_errors_are_one_line(
    generate: Path, folder: Path, tmp_path: Path, model: str, prompts: str | None, options: list, message: str
) -> None:
    path = folder / "prompts.json"
    if prompts is not None:
        path = tmp_path / "prompts.json"
        path.write_text(prompts)
    given = dict(zip(FORM[::2], FORM[1::2], strict=True))
    given |= dict(zip(options[::2], options[1::2], strict=True))
    flat = [part for pair in given.items() for part in pair]
    result = attempt(generate, folder / model, path, *flat, "--output", tmp_path / "tokens.json")
    assert result.returncode == (2 if "(generate --help)" in result.stderr else 1)
    assert message in result.stderr
    assert result.stderr.startswith("generate: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "tokens.json").exists()


def test_a_cache_that_is_not_given_back_whole_is_an_error(generate: Path, folder: Path, tmp_path: Path) -> None:
    class Forgets(Decoder):
        def forward(
            self, ids: Tensor, mask: Tensor, positions: Tensor, past: tuple[Tensor, Tensor]
        ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            x = self.words(ids) + self.places(positions)
            return self.head(x), past

    torch.jit.script(Forgets().eval()).save(tmp_path / "forgets.pt")
    result = attempt(generate, tmp_path / "forgets.pt", folder / "prompts.json", *FORM)
    expected = "expected the cache 'past' to be Float of shape [3, 2, 4, 8], got Float of shape [3, 2, 0, 8]"
    assert expected in result.stderr


def test_a_decoder_without_positions_takes_prompts_of_one_length(generate: Path, folder: Path, tmp_path: Path) -> None:
    """It would count the padding of the others."""
    torch.manual_seed(0)
    base = torch.jit.script(CountingDecoder().eval())
    base.save(tmp_path / "base.pt")
    for options in ((), ("--num-beams", 2)):
        result = attempt(generate, tmp_path / "base.pt", folder / "prompts.json", *FORM, *options)
        assert result.returncode == 1 and result.stderr.count("\n") == 1
        assert "base.pt: forward takes no positions, so it would count padding: " in result.stderr
        assert "expected prompts of one length, got 1 and 4 tokens" in result.stderr
    prompts = [[3, 4, 5], [6, 7, 8], [9, 3, 9]]
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": prompts}))
    alone = []
    for prompt in prompts:  # each in one pass over all that is there
        ids = list(prompt)
        for _ in range(6):
            mask = torch.full((len(ids), len(ids)), -1e30).triu(1)[None, None]
            logits = base(torch.tensor([ids]), mask, (torch.zeros(1, HEADS, 0, HIDDEN // HEADS),) * 2)[0]
            ids.append(int(logits[0, -1].argmax()))
        alone.append(ids[3:])
    assert generated(generate, tmp_path, tmp_path, "--max-new-tokens", 6, model="base.pt") == alone
    stop = alone[0][1]  # the first sequence ends early, and goes on as padding
    found = generated(generate, tmp_path, tmp_path, "--max-new-tokens", 6, "--stop", stop, model="base.pt")
    assert found == [row[: row.index(stop) + 1] if stop in row else row for row in alone]


def test_a_cache_whose_length_is_not_known(generate: Path, folder: Path, tmp_path: Path) -> None:
    class Nothing(torch.nn.Module):
        def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: list[Tensor]) -> tuple[Tensor, Tensor]:
            return ids, mask

    torch.jit.script(Nothing()).save(tmp_path / "nothing.pt")
    result = attempt(generate, tmp_path / "nothing.pt", folder / "prompts.json", *FORM)
    assert (
        result.returncode == 1 and "nothing.pt: the cache is a list: say how long it is with --layers" in result.stderr
    )
