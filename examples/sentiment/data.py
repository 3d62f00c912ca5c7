#!/usr/bin/env python3
"""Four collections of sentences that people have rated, as files for scripts/train.py.

    data.py --output build/sentiment/data

writes DOMAIN_train.csv, DOMAIN_validation.csv and DOMAIN_test.csv (columns text, label, mean, group) for tweets, movie
reviews, Amazon reviews and New York Times editorials. The ratings are those of Hutto and Gilbert (2014), "VADER: A
parsimonious rule-based model for sentiment analysis of social media text", MIT licence: means over 20 raters, -4 to 4.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import io
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))

from torchgraft._files import write_whole  # noqa: E402
from torchgraft.training import Example, split_examples  # noqa: E402

LABELS = ["negative", "neutral", "positive"]
THRESHOLD = 0.5  # negative: mean < -0.5; neutral: -0.5 <= mean <= 0.5; positive: mean > 0.5
SPLIT_SEED = 2014
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1

CACHE = ROOT / "build" / "datasets"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
_REQUIREMENT = ROOT / "requirements" / "sentiment.txt"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_MEMBER = "hutto_ICWSM_2014/{}_GroundTruth.txt"
_LARGEST = 16 * 2**20  # bytes of one member; the largest is 2.3 MB
# (file stem, whether ids are REVIEW_SENTENCE). Other ids number the sentences, of sources that the archive
# does not name.
COLLECTIONS = {
    "tweets": ("tweets", False),
    "movie_reviews": ("movieReviewSnippets", False),
    "amazon_reviews": ("amazonReviewSnippets", True),
    "nyt_editorials": ("nytEditorialSnippets", True),
}
DOMAINS = list(COLLECTIONS)


class DataError(Exception):
    """Why there are no sentences, in one line."""


@dataclass(frozen=True)
class Sentence:
    """mean: of its ratings. group: the review or editorial that holds it, or its own id."""

    text: str
    mean: float
    group: str

    @property
    def label(self) -> str:
        return LABELS[(self.mean >= -THRESHOLD) + (self.mean > THRESHOLD)]


def fetch_archive(folder: Path = CACHE) -> Path:
    """The source archive of vaderSentiment. pip downloads it unless it is there.

    Raises:
        DataError: pip cannot download it, or its hash is another than the expected one.
    """
    path = folder / ARCHIVE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Without build isolation pip reads the archive's metadata with the setuptools of this environment.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
                   "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes",
                   "--requirement", str(_REQUIREMENT), "--dest", str(folder)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode != 0 or not path.is_file():
            reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise DataError(f"{path}: pip could not download it ({reason})")
    expected = _REQUIREMENT.read_text().split("sha256:")[1].strip()
    if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise DataError(f"{path}: not the archive that {_REQUIREMENT.name} names (its hash differs); remove it")
    return path


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """One regular file's bytes, read without extracting it: no member can write anywhere."""
    try:
        entry = archive.getmember(name)
    except KeyError as error:
        raise DataError(f"the archive has no {name}") from error
    if not entry.isreg() or entry.size > _LARGEST:
        raise DataError(f"{name} in the archive is not a file of at most {_LARGEST} bytes")
    return archive.extractfile(entry).read()


def read_collections(archive: Path) -> dict[str, list[Sentence]]:
    """{domain: sentences}, without repetitions (up to spaces and case), which could land on both sides of a split."""
    with tarfile.open(archive, "r:gz") as outer:
        inner = _member(outer, _INNER)
    with tarfile.open(fileobj=io.BytesIO(inner), mode="r:gz") as files:
        return {
            domain: _sentences(_member(files, _MEMBER.format(stem)).decode("utf-8"), grouped)
            for domain, (stem, grouped) in COLLECTIONS.items()
        }


def _sentences(content: str, grouped: bool) -> list[Sentence]:
    """Of lines "id TAB mean TAB text". Some texts are HTML, some twice over ("&amp;amp;")."""
    result, seen = [], set()
    for line in filter(None, content.split("\r\n")):
        identity, mean, text = line.split("\t")
        text = " ".join(html.unescape(html.unescape(text)).split())
        if text and text.casefold() not in seen:
            seen.add(text.casefold())
            result.append(Sentence(text, float(mean), identity.split("_")[0] if grouped else identity))
    return result


def split(sentences: list[Sentence]) -> dict[str, list[Sentence]]:
    """train, validation and test, by a fixed seed; sentences of one review or editorial stay together."""
    examples = [
        Example(sentence.text, sentence.label, str(index), sentence.group) for index, sentence in enumerate(sentences)
    ]
    rest, test = split_examples(examples, TEST_SHARE, SPLIT_SEED)
    training, validation = split_examples(rest, VALIDATION_SHARE / (1 - TEST_SHARE), SPLIT_SEED)
    parts = {"train": training, "validation": validation, "test": test}
    return {name: [sentences[int(example.where)] for example in part] for name, part in parts.items()}


def prepare(folder: Path, cache: Path = CACHE) -> dict[str, dict[str, Path]]:
    """Writes the files; {domain: {"train", "validation", "test": path}}."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, dict[str, Path]] = {}
    for domain, sentences in read_collections(fetch_archive(cache)).items():
        for part, chosen in split(sentences).items():
            buffer = io.StringIO(newline="")
            writer = csv.writer(buffer)
            writer.writerow(["text", "label", "mean", "group"])
            writer.writerows((one.text, one.label, f"{one.mean:.4f}", one.group) for one in chosen)
            path = folder / f"{domain}_{part}.csv"
            write_whole(buffer.getvalue().encode(), path)
            paths.setdefault(domain, {})[part] = path
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "sentiment" / "data")
    parser.add_argument("--fetch-only", action="store_true", help="download the archive, write nothing else")
    arguments = parser.parse_args()
    try:
        if arguments.fetch_only:
            print(fetch_archive())
            return 0
        for parts in prepare(arguments.output).values():
            for path in parts.values():
                with path.open(encoding="utf-8", newline="") as file:
                    counts = Counter(row["label"] for row in csv.DictReader(file))
                print(f"{path}: " + ", ".join(f"{counts[label]} {label}" for label in LABELS))
        return 0
    except (DataError, OSError, ValueError, tarfile.TarError, subprocess.SubprocessError) as error:
        print("data: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
