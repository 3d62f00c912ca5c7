"""The examples of docs/adapters.md run as they stand, one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_of_adapters_run(tmp_path) -> None:
    text = (ROOT / "docs" / "adapters.md").read_text()
    marked = re.findall(r"<!-- test -->\n```python\n(.*?)```", text, re.DOTALL)
    assert len(marked) == text.count("```python") == 12
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(marked)], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for written in ("reviews_adapter/adapter.safetensors", "tweets_adapter/pytorch_adapter.bin", "gates.png",
                    "each.svg", "lowered.pt"):  # fmt: skip
        assert (tmp_path / written).stat().st_size > 0
