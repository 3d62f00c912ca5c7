"""scripts/demo: what its tables show. Setting up and building, which scripts/demo does before, are other tests'."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import torchgraft
from hosts_support import ROOT, run

sys.path.insert(0, str(ROOT / "scripts"))

import demo_sentiment  # noqa: E402
from demo_models import Batch, trace_encoder  # noqa: E402


@pytest.fixture(scope="module")
def base() -> torch.jit.ScriptModule:
    ids = torch.ones(2, 8, dtype=torch.int64)
    return trace_encoder(Batch(ids, ids), torch.float32)


def shown(base: torch.jit.ScriptModule, folder: Path) -> str:
    text = io.StringIO()
    demo_sentiment.show_sentiment(Console(file=text, width=160), base, folder / "sentiment.pt")
    return text.getvalue()


def row_of(table: str, sentence: str) -> list[str]:
    """The cells behind a sentence, which a narrow column may break."""
    line = next(line for line in table.splitlines() if sentence[:30] in line)
    return re.findall(r"(negative|neutral|positive) \d\.\d\d", line)


def test_the_trained_adapters_tell_praise_from_blame_and_have_gates_of_their_own(base, tmp_path: Path) -> None:
    text = shown(base, tmp_path)
    domains = list(demo_sentiment.DOMAINS)
    assert len(domains) == 3 and all(domain in text for domain in domains)
    assert row_of(text, "Wonderful acting, a moving story")[domains.index("movie_reviews")] == "positive"
    assert row_of(text, "This film is a complete waste")[domains.index("movie_reviews")] == "negative"
    assert row_of(text, "Works exactly as described")[domains.index("amazon_reviews")] == "positive"
    gates = {name: re.search(rf"{name} .*", text[text.index("Their gates") :]) for name in domains}
    assert gates["movie_reviews"] is None  # MAM
    numbers = [re.findall(r"\d\.\d{3}", gates[name][0]) for name in ("tweets", "amazon_reviews")]
    assert len(numbers[0]) > 2 and numbers[0] != numbers[1]
    model = torchgraft.load_module(tmp_path / "sentiment.pt")
    configs = [info.config for info in torchgraft.list_adapters(model)]
    assert sum("is_parallel" in config and '"is_parallel":true' in config.replace(" ", "") for config in configs) == 1


def test_a_mixed_batch_that_differs_from_its_rows_alone_ends_the_demo(base, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo_sentiment, "LIMIT", -1.0)
    with pytest.raises(demo_sentiment.DemoError, match="a row of a mixed batch differs by"):
        shown(base, tmp_path)


@pytest.mark.slow(seconds=60)
def test_the_whole_demo(serve, tmp_path: Path) -> None:
    done = run(sys.executable, ROOT / "scripts" / "demo.py", "--serve", serve, "--output", tmp_path)
    for title in ("Cosine similarity", "Sentiment by adapters", "Their gates", "Files"):
        assert title in done.stdout, title
