"""A .pt that holds less of a tensor than its shape says, which torch.jit.load takes: programs in C++ refuse it before
anything of it runs."""

import pytest
import torch
from safetensors.torch import save_file

from hosts_support import attempt, with_short_record


@pytest.mark.parametrize("program", ["server_program", "train_program", "serve", "generate"])
def test_it_is_refused_in_one_line(request, program, models, tmp_path):
    path = with_short_record(models / "base.pt", tmp_path / "short.pt")
    ids = torch.ones(4, 3, dtype=torch.int64)
    save_file({"input_ids": ids, "attention_mask": ids.clone(), "labels": torch.arange(4) % 2}, tmp_path / "examples")
    (tmp_path / "inputs.json").write_text('{"inputs": [[[1, 2]], [[1, 1]]]}')
    (tmp_path / "prompts.json").write_text('{"prompts": [[3]]}')
    options = {
        "server_program": ["--adapters", models / "adapters", "--port", 0],
        "train_program": [tmp_path / "examples", "--labels", "bad,good", "-o", tmp_path / "out"],
        "serve": [tmp_path / "inputs.json"],
        "generate": [tmp_path / "prompts.json", "--heads", 2, "--head-size", 12],
    }
    failed = attempt(request.getfixturevalue(program), path, *options[program])
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
    assert f"{path}: not a TorchScript file that can be loaded" in failed.stderr
    assert "its record 0 has 4 bytes, expected " in failed.stderr
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("program", ["serve", "generate"])
def test_a_file_that_ends_early_is_named(request, program, models, tmp_path):
    path = tmp_path / "half.pt"
    whole = (models / "base.pt").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "input.json").write_text('{"prompts": [[3]], "inputs": [[[1, 2]], [[1, 1]]]}')
    form = ["--heads", 2, "--head-size", 12] if program == "generate" else []
    failed = attempt(request.getfixturevalue(program), path, tmp_path / "input.json", *form)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
    assert f"{path}: not a TorchScript file that can be loaded" in failed.stderr
    assert "central directory" in failed.stderr
