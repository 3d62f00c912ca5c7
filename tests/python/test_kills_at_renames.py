"""graft.py, save_adapter and train.py, killed at each of their renames: what lies there is old or new, and whoever does
it again ends as if nobody had been killed.

Each program is a process of its own, in which rename() can kill (consumer/kill_at_rename.cpp), and which forks one
child for each rename.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def killed(number: int, program: Callable[[], object]) -> bool:
    """Whether a child that runs `program` came to so many renames, the last of which killed it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.environ["KILL_AT_RENAME"] = str(number)
            program()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0


def grafts(folder: Path) -> int:
    import torch

    from grafted import base
    from scripts_here import run_here

    out = folder / "out.pt"
    base("bert_sdpa", torch.float32).save(folder / "base.pt")

    def run(config: str) -> None:
        done = run_here("graft.py", "add", folder / "base.pt", "-o", out, "--config", config, "--name", config)
        assert done.returncode == 0, done.stderr

    run("lora")
    for number in itertools.count(1):
        if not killed(number, lambda: run("mam")):
            break
        assert torch.jit.load(out).adapter_names() == ["lora"]
    assert torch.jit.load(out).adapter_names() == ["mam"]
    assert sorted(path.name for path in folder.iterdir()) == ["base.pt", "out.pt"]
    return number - 1


def saves(folder: Path) -> int:
    import torchgraft
    from test_reading import make_twins, version_of

    old, new = make_twins()
    torchgraft.save_adapter(old, "task", folder)
    whole = sorted(path.name for path in folder.iterdir())
    for number in itertools.count(1):
        torchgraft.save_adapter(old, "task", folder)
        assert sorted(path.name for path in folder.iterdir()) == whole
        if not killed(number, lambda: torchgraft.save_adapter(new, "task", folder)):
            break
        if (folder / "adapter_config.json").exists():
            version_of(folder)
    assert version_of(folder) == 2
    return number - 1


def trains(folder: Path) -> int:
    sys.path.insert(0, str(HERE / "training"))
    from test_kills import assert_as, train
    from tiny import write_files

    files, whole, output = write_files(folder), folder / "whole", folder / "out"
    epoch = ("--epochs", 1, "--checkpoint-every", 2)
    assert train(files, whole, *epoch) == 0
    for number in itertools.count(1):
        if not killed(number, lambda: train(files, output, *epoch)):
            break
        assert train(files, output, *epoch) == 0
        assert_as(whole, output)
        shutil.rmtree(output)
    assert_as(whole, output)
    return number - 1


@pytest.mark.slow(seconds=90)
@pytest.mark.parametrize(("program", "least"), [("grafts", 1), ("saves", 4), ("trains", 8)])
def test_killed_at_every_rename(program: str, least: int, tmp_path: Path) -> None:
    library = tmp_path / "kill_at_rename.so"
    source = HERE.parent / "consumer" / "kill_at_rename.cpp"
    subprocess.run([os.environ.get("CXX", "c++"), "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, __file__, program, folder],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": f"{HERE.parents[1] / 'python'}:{HERE}"},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout.splitlines()[-1])
    print(f"{program}: {kills} kills")
    assert kills >= least


if __name__ == "__main__":
    print({"grafts": grafts, "saves": saves, "trains": trains}[sys.argv[1]](Path(sys.argv[2])))
