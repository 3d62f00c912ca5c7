"""A .pt that holds less of a tensor than its shape says, which torch.jit.load takes: the server and train_cpp refuse it
before anything of it runs."""

import pytest
import torch
from safetensors.torch import save_file

from hosts_support import attempt, with_short_record


@pytest.mark.parametrize("program", ["server", "train"])
def test_it_is_refused_in_one_line(request, program, models, tmp_path):
    path = with_short_record(models / "base.pt", tmp_path / "short.pt")
    ids = torch.ones(4, 3, dtype=torch.int64)
    save_file({"input_ids": ids, "attention_mask": ids.clone(), "labels": torch.arange(4) % 2}, tmp_path / "examples")
    options = {
        "server": ["--adapters", models / "adapters", "--port", 0],
        "train": [tmp_path / "examples", "--labels", "bad,good", "-o", tmp_path / "out"],
    }
    failed = attempt(request.getfixturevalue(f"{program}_program"), path, *options[program])
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
    assert f"{path}: not a TorchScript file that can be loaded (its record 0 has 4 bytes, expected " in failed.stderr
    assert not (tmp_path / "out" / "adapter").exists()
