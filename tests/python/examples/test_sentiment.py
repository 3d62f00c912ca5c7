"""examples/sentiment: the sentences, and the quick run from beginning to end."""

import csv
import io
import json
import re
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "sentiment"
sys.path.insert(0, str(EXAMPLE))

import data  # noqa: E402
import experiment  # noqa: E402
import torchgraft  # noqa: E402

ARCHIVE = data.CACHE / data.ARCHIVE
# scripts/test runs scripts/setup, which fails where it cannot have the archive: there nothing is skipped.
needs_archive = pytest.mark.skipif(not ARCHIVE.is_file(), reason=f"no {ARCHIVE}: scripts/setup downloads it")


@pytest.fixture(scope="module")
def collections() -> dict[str, list[data.Sentence]]:
    return data.read_collections(ARCHIVE)


@needs_archive
def test_the_collections_are_whole(collections: dict) -> None:
    """As many as the authors say, less the texts that occur twice."""
    said = {"tweets": 4200, "movie_reviews": 10605, "amazon_reviews": 3708, "nyt_editorials": 5190}
    for domain, sentences in collections.items():
        assert 0.98 * said[domain] < len(sentences) <= said[domain]
        assert all(-4 <= one.mean <= 4 and one.text and "&amp;" not in one.text for one in sentences)
        assert len({one.text.casefold() for one in sentences}) == len(sentences)
    assert any("clichés" in one.text for one in collections["movie_reviews"])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("mean", "label"), [(-0.51, "negative"), (-0.5, "neutral"), (0.5, "neutral"), (0.51, "positive")]
)
def test_the_thresholds(mean: float, label: str) -> None:
    assert data.Sentence("text", mean, "1").label == label


@needs_archive
def test_a_split_cuts_no_review_and_no_editorial(collections: dict) -> None:
    for domain, sentences in collections.items():
        parts = data.split(sentences)
        assert sum(map(len, parts.values())) == len(sentences)
        groups = [{one.group for one in part} for part in parts.values()]
        assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2], domain
        assert 0.2 <= len(parts["test"]) / len(sentences) < 0.21


def test_outcomes_of_other_rates_are_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = experiment.Size(200, 13, test=200)
    plan = experiment.Plan(size, [0], size, [0], [200], validation=500)
    job = experiment.Job("tweets", "MAM", 200, 0)
    outcome = experiment.Outcome(0.5, 0.4, 1, 1, 13, 200, 200, 1.0, 0.4)
    path = tmp_path / "results.json"
    experiment.Results(path, experiment.settings_of(plan)).add(job, outcome)
    assert experiment.Results(path, experiment.settings_of(plan)).outcomes == {job: outcome}
    monkeypatch.setitem(experiment.DEFAULT_RATES, "prefix", 1e-3)
    assert experiment.Results(path, experiment.settings_of(plan)).outcomes == {}


def _archive(folder: Path, name: str, kind: bytes = tarfile.REGTYPE, size: int = 4) -> Path:
    path = folder / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.size, entry.linkname = kind, size if kind == tarfile.REGTYPE else 0, "/etc/passwd"
        archive.addfile(entry, io.BytesIO(bytes(size)))
    return path


def test_an_archive_that_is_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(data.DataError, match="the archive has no"):
        data.read_collections(_archive(tmp_path, "../../escaped"))
    with pytest.raises(data.DataError, match="is not a file of at most"):
        data.read_collections(_archive(tmp_path, data._INNER, tarfile.SYMTYPE))
    monkeypatch.setattr(data, "_LARGEST", 3)
    with pytest.raises(data.DataError, match="is not a file of at most 3 bytes"):
        data.read_collections(_archive(tmp_path, data._INNER))
    (tmp_path / data.ARCHIVE).write_bytes(b"another")
    with pytest.raises(data.DataError, match="its hash differs"):
        data.fetch_archive(tmp_path)
    assert not (tmp_path.parent.parent / "escaped").exists()


def accuracies(runs: list[dict], method: str) -> list[float]:
    """Of the runs that the report compares, one a seed."""
    return [
        run["outcome"]["accuracy"]
        for run in runs
        if run["job"]["method"] == method and (run["job"]["domain"], run["job"]["sentences"]) == ("movie_reviews", 2000)
    ]


@needs_archive
@pytest.mark.slow(seconds=600)
def test_the_quick_run(tmp_path: Path) -> None:
    """From the archive to the report. UniPELT is better than the probe by more than either varies over seeds, and the
    report says so."""
    command = [sys.executable, str(EXAMPLE / "run.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    unipelt, probe = accuracies(runs, "UniPELT"), accuracies(runs, "linear probe")
    assert len(unipelt) == len(probe) == 3
    margin = statistics.fmean(unipelt) - statistics.fmean(probe)
    assert margin > max(max(unipelt) - min(unipelt), max(probe) - min(probe)), (unipelt, probe)
    report, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    for text in ("UniPELT beats the probe", f"{margin:.3f} above the probe's", "MAM", "LoRA", "SeqBn", "prefix tuning"):
        assert text in report and text in page
    for domain in data.DOMAINS:
        assert f"gates_{domain}.png" in page and (tmp_path / f"gates_{domain}.png").stat().st_size > 0
        assert (tmp_path / "adapters" / domain / "adapter_config.json").is_file()
        with (tmp_path / "data" / f"{domain}_train.csv").open(encoding="utf-8", newline="") as file:
            assert {row["label"] for row in csv.DictReader(file)} == set(data.LABELS)
    (tmp_path / "report.md").unlink()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)  # nothing is left to run
    assert again.returncode == 0 and (tmp_path / "report.md").read_text() == report, again.stderr


@needs_archive
@pytest.mark.slow(seconds=60)
def test_the_example_of_fusion(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE / "fusion.py"), "--sentences", "48", "--epochs", "1", "--test", "20"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said = re.search(r"The fusion (beats|does not beat) the best single adapter, \w+: ([+-]\d\.\d+)", done.stdout)
    assert said and (said[1] == "beats") == (float(said[2]) > 0), done.stdout
    assert (tmp_path / "fused_0" / "adapter_setup.json").exists()


@needs_archive
@pytest.mark.slow(seconds=60)
def test_the_example_of_mad_x(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE / "mad_x.py"), "--sentences", "48", "--epochs", "1", "--test", "20"]
    done = subprocess.run(
        [*command, "--steps", "2", "--output", str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"loss at masked words: \d+\.\d+ of the base, \d+\.\d+ of the language", done.stdout)
    assert re.search(r"two rows of one batch, each on its stack: \w+, \w+", done.stdout), done.stdout
    domains = ["movie_reviews", "amazon_reviews"]
    names = torchgraft.load_module(tmp_path / "mad_x.pt").adapter_names()
    assert names == ["reviews", *domains, *(f"{domain}_on_reviews" for domain in domains)]
