"""examples/generate --num-beams: token for token what `generate(num_beams=...)` of transformers finds."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

import adapters
import torchgraft
from hosts_support import attempt, run

HEADS, WORDS, LAYERS, NEW = 2, 61, 2, 14
FORM = ("--heads", HEADS, "--head-size", 12)
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [2, 2]]


class Step(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids, mask, positions, past):
        cache = DynamicCache.from_legacy_cache(past)
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )[0]
        return logits, cache.to_legacy_cache()


def decoder() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(n_embd=24, n_head=HEADS, n_layer=LAYERS, vocab_size=WORDS, n_positions=64, initializer_range=0.3)
    how = dict(bos_token_id=0, eos_token_id=1, attn_implementation="eager")  # sdpa hides prefixes in the library
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **how)).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """grafted.pt with "lora" and "unipelt" of the library, and the library's model."""
    folder = tmp_path_factory.mktemp("beams")
    past = tuple((torch.randn(1, HEADS, 4, 12), torch.randn(1, HEADS, 4, 12)) for _ in range(LAYERS))
    mask = torch.full((3, 7), torch.finfo(torch.float32).min).triu(5)[None, None]
    traced = decoder()
    traced.config.return_dict = False
    example = (torch.tensor([[5, 6, 7]]), mask, torch.tensor([[4, 5, 6]]), past)
    base = torch.jit.trace(Step(traced), example, check_trace=False, strict=False)
    library = decoder()
    adapters.init(library)
    for name in ("lora", "unipelt"):
        library.add_adapter(name, config=name)
        for parameter in (value for key, value in library.named_parameters() if f".{name}." in key):
            torch.nn.init.normal_(parameter, std=0.3)
        library.save_adapter(folder / name, name)
    directories = {name: folder / name for name in ("lora", "unipelt")}
    torchgraft.graft(base, adapters=directories, example=example).save(folder / "grafted.pt")
    (folder / "prompts.json").write_text(json.dumps({"prompts": PROMPTS}))
    return {"folder": folder, "library": library.eval()}


def of_library(model: torch.nn.Module, prompt: list[int], adapter: str | None, stop: list[int], **how) -> list[int]:
    model.set_active_adapters(adapter)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=stop or None,
            pad_token_id=0, **how,
        )[0, len(prompt) :].tolist()  # fmt: skip
    ends = [place for place, token in enumerate(found) if token in stop]
    return found[: ends[0] + 1] if ends else found


@pytest.mark.parametrize("stop", [[], [1], [17, 23, 40]], ids=["no stop", "one stop", "three stops"])
@pytest.mark.parametrize(
    ("num_beams", "penalty", "early"), [(2, 1.0, False), (3, 0.0, True), (5, 2.0, False), (4, -0.7, True)]
)
def test_beams_are_those_of_transformers(
    generate: Path, models: dict, tmp_path: Path, num_beams: int, penalty: float, early: bool, stop: list[int]
) -> None:
    """In one batch, each sequence with its own adapter."""
    output = tmp_path / "tokens.json"
    options = ["--num-beams", num_beams, f"--length-penalty={penalty}", "--max-new-tokens", NEW]
    options += ["--early-stopping"] * early + (["--stop", ",".join(map(str, stop))] if stop else [])
    run(generate, models["folder"] / "grafted.pt", models["folder"] / "prompts.json", *FORM, *options,
        "--adapter-ids", "0,-1,0,-1", "--output", output)  # fmt: skip
    how = dict(num_beams=num_beams, length_penalty=penalty, early_stopping=early)
    found = json.loads(output.read_text())["tokens"]
    for prompt, adapter, tokens in zip(PROMPTS, ["lora", None] * 2, found, strict=True):
        assert tokens == of_library(models["library"], prompt, adapter, stop, **how), prompt


def test_gates_of_one_prompt(generate: Path, models: dict, tmp_path: Path) -> None:
    """A prompt without padding has the library's gates."""
    output = tmp_path / "tokens.json"
    for prompt in PROMPTS[:3]:
        (tmp_path / "prompts.json").write_text(json.dumps({"prompts": [prompt]}))
        run(generate, models["folder"] / "grafted.pt", tmp_path / "prompts.json", *FORM, "--num-beams", 3, "--stop", 1,
            "--adapter", "unipelt", "--max-new-tokens", NEW, "--output", output)  # fmt: skip
        found = json.loads(output.read_text())["tokens"][0]
        assert found == of_library(models["library"], prompt, "unipelt", [1], num_beams=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-beams", 1), "--num-beams"),
        (("--num-beams", 3, "--sample"), "excludes"),
        (("--num-beams", 3, "--stream"), "excludes"),
        (("--length-penalty", 2), "--num-beams"),
    ],
)
def test_wrong_options(generate: Path, models: dict, options: tuple, message: str) -> None:
    result = attempt(generate, models["folder"] / "grafted.pt", models["folder"] / "prompts.json", *FORM, *options)
    assert result.returncode == 2 and message in result.stderr
