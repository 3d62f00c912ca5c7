"""examples/generate/two_domains.py, with fewer steps: each adapter writes in its own domain's manner."""

import subprocess
import sys
from pathlib import Path

import pytest

from hosts_support import ROOT, run

DOMAINS = ["tweets", "nyt_editorials"]


@pytest.mark.slow(seconds=150)
def test_each_adapter_knows_its_own_domain_best(generate: Path, tmp_path: Path) -> None:
    steps = ["--base-steps", 60, "--adapter-steps", 60]
    script = ROOT / "examples" / "generate" / "two_domains.py"
    printed = run(sys.executable, script, "--program", generate, "--output", tmp_path, *steps).stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    found = {row[0]: dict(zip(["base", *DOMAINS], map(float, row[1:]), strict=True)) for row in rows}
    assert list(found) == DOMAINS
    for domain, values in found.items():
        (other,) = set(DOMAINS) - {domain}
        assert values[domain] < 0.97 * values[other] and values[domain] < values["base"], found
    texts = [line.partition(" | ") for line in printed.splitlines() if " | " in line]
    written: dict[str, dict[str, str]] = {}
    for prompt, _, rest in texts:
        adapter, _, text = rest.partition(": ")
        assert text.startswith(prompt)
        written.setdefault(prompt, {})[adapter] = text
    assert len(written) == 4 and all(list(each) == ["base", *DOMAINS] for each in written.values())
    assert any(len(set(each.values())) == 3 for each in written.values())


@pytest.mark.slow(seconds=15)
def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    script = ROOT / "examples" / "generate" / "two_domains.py"
    command = [sys.executable, str(script), "--program", str(tmp_path / "generate")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no such program; examples/generate/README.md says how to build it" in done.stderr
