"""Files and texts of strangers: nothing that they hold ends the process, is waited for, or is read half."""

import contextlib
import fcntl
import itertools
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import torchgraft
from grafted import base, grafted
from scripts_here import run_here
from test_adapter_fusion import library_fusion
from test_compositions import bank
from torchgraft._files import write_whole
from torchgraft._libraries import patcher

pytestmark = pytest.mark.quick

DEEP = "[" * 1_000_000 + "]" * 1_000_000


@pytest.fixture(autouse=True)
def _alarm():
    """Whoever waits for a file is interrupted."""

    def give_up(*_) -> None:
        raise TimeoutError("waited for a file")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def directory(tmp_path) -> Path:
    """An adapter with a head."""
    model = torchgraft.add_head(grafted("bert_sdpa", torch.float32, "lora"), "task", torchgraft.HeadConfig())
    torchgraft.save_adapter(model, "task", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(DEEP, "nested too deeply, expected JSON of at most 64 levels", id="deep"),
        pytest.param('{"a":' * 65 + "1" + "}" * 65, "nested too deeply", id="deep objects"),
        pytest.param("[" * 100_000, "nested too deeply", id="open brackets"),
        ("1e400", "not JSON .the number 1e400 is out of range"),
        ("[NaN]", "not JSON .NaN"),
        ("-Infinity", "not JSON"),
        (b'"\xff"', "not JSON"),
        ('"\\ud800"', "not JSON"),
        ('{"\\udc00": 1}', "not JSON"),
        ("1" * 5000, "not JSON"),
        ("{", "not JSON"),
        ('{"a": {"b": 1, "b": 2}}', 'not JSON .an object has the name "b" twice'),
        ("", "not JSON"),
    ],
)
def test_what_is_no_json_is_refused(text, message: str) -> None:
    with pytest.raises(torchgraft.GraftError, match=f"^the body: {message}"):
        torchgraft.parse_json(text, "the body")


def test_json_is_read() -> None:
    assert torchgraft.parse_json('{"a": [1, 2.5, null, "\\ud83d\\ude00["]}', "") == {"a": [1, 2.5, None, "\U0001f600["]}
    assert torchgraft.parse_json("[" * 64 + "]" * 64, "") is not None


@pytest.mark.parametrize("file", ["adapter_config.json", "head_config.json"])
@pytest.mark.parametrize("text", [DEEP, '{"config": 1e400}', b"\xff"], ids=["deep", "1e400", "bytes"])
def test_a_configuration_that_is_no_json_is_named(directory: Path, file: str, text) -> None:
    (directory / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(torchgraft.GraftError, match=f"{file}: (nested|not JSON|expected a file of at most)"):
        torchgraft.load_adapter(base("bert_sdpa", torch.float32), directory)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # an address has at most 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 5 << 30)


NOT_REGULAR = [Path.mkdir, _fifo, _socket, _device, _loop, _nowhere, _sparse]


def _says_what(put: Callable, message: str) -> bool:
    kinds = {"mkdir": "directory", "_fifo": "FIFO", "_socket": "socket", "_device": "device", "_sparse": "at most"}
    return kinds.get(put.__name__, "cannot read") in message


@pytest.mark.parametrize("put", NOT_REGULAR)
@pytest.mark.parametrize(
    "file",
    ["adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin", "head_config.json", "model_head.safetensors"],
)
def test_only_regular_files_are_read(directory: Path, file: str, put) -> None:
    """In Python, and in C++ where it reads the file, too."""
    if file == "pytorch_adapter.bin":
        (directory / "adapter.safetensors").unlink()
    else:
        (directory / file).unlink()
    put(directory / file)
    with pytest.raises(torchgraft.GraftError, match=f"{file}: ") as raised:
        torchgraft.load_adapter(base("bert_sdpa", torch.float32), directory)
    assert _says_what(put, str(raised.value))


@pytest.fixture(scope="module")
def setup_directory(tmp_path_factory) -> Path:
    """A composition with its adapters and AdapterFusion layers."""
    folder = tmp_path_factory.mktemp("setup")
    library_fusion("bert_sdpa", ["bn", "bn2"], "static", folder / "fusion")
    module = torchgraft.load_adapter_fusion(bank("bert_sdpa", "bn", "bn2"), folder / "fusion", "bn,bn2")
    module = torchgraft.compose(module, "both", torchgraft.Fuse("bn", "bn2"))
    torchgraft.save_adapter_setup(module, "both", folder / "both")
    return folder / "both"


@pytest.mark.parametrize("put", NOT_REGULAR)
@pytest.mark.parametrize(
    "file",
    [
        "adapter_setup.json",
        "bn,bn2/adapter_fusion_config.json",
        "bn,bn2/model_adapter_fusion.safetensors",
        "bn,bn2/pytorch_model_adapter_fusion.bin",
    ],
)
def test_only_regular_files_of_a_composition_are_read(setup_directory: Path, file: str, put, tmp_path) -> None:
    directory = shutil.copytree(setup_directory, tmp_path / "both")
    if file.endswith(".bin"):
        (directory / file).with_name("model_adapter_fusion.safetensors").unlink()
    else:
        (directory / file).unlink()
    put(directory / file)
    with pytest.raises(torchgraft.GraftError, match=f"{Path(file).name}: ") as raised:
        torchgraft.load_adapter_setup(base("bert_sdpa", torch.float64), directory, "c")
    assert _says_what(put, str(raised.value))


def test_sites_are_a_regular_file(tmp_path) -> None:
    _fifo(tmp_path / "sites.json")
    with pytest.raises(torchgraft.GraftError, match="expected a regular file, got a FIFO"):
        torchgraft.graft(base("bert_sdpa", torch.float32), "lora", "task", sites=tmp_path / "sites.json")
    _sparse(tmp_path / "large.json")
    with pytest.raises(torchgraft.GraftError, match="large.json: expected a file of at most 67108864 bytes"):
        torchgraft.graft(base("bert_sdpa", torch.float32), "lora", "task", sites=tmp_path / "large.json")
    (tmp_path / "deep.json").write_text('{"layers": ' + DEEP + "}")
    with pytest.raises(torchgraft.GraftError, match="deep.json: nested too deeply"):
        torchgraft.graft(base("bert_sdpa", torch.float32), "lora", "task", sites=tmp_path / "deep.json")


def _leftovers(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{target.name}.??????.torchgraft-tmp"))


def test_a_killed_writer_leaves_its_file_until_the_next_one_writes(tmp_path) -> None:
    target = tmp_path / "out.pt"
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), patcher().TemporaryFile(str(target)) as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    os.waitpid(child, 0)
    assert len(_leftovers(target)) == 1
    (tmp_path / ".out.pt.12345678.tmp").write_text("the user's")
    with patcher().TemporaryFile(str(target)) as living:
        write_whole(b"quick", target)
        assert target.read_bytes() == b"quick"
        assert len(_leftovers(target)) == 1
        living.write(b"slow")
        living.keep()
    assert target.read_bytes() == b"slow"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.pt.12345678.tmp", "out.pt"]


def test_a_large_file_is_written_whole_and_keeps_its_link_and_permissions(tmp_path) -> None:
    content = random.Random(0).randbytes((1 << 25) + 7)
    (tmp_path / "out.pt").symlink_to("real.pt")
    (tmp_path / "real.pt").touch(0o600)
    write_whole(content, tmp_path / "out.pt")
    assert (tmp_path / "out.pt").is_symlink() and (tmp_path / "real.pt").read_bytes() == content
    assert (tmp_path / "real.pt").stat().st_mode & 0o777 == 0o600


def test_an_exception_between_two_parts_leaves_the_old_file(tmp_path) -> None:
    target = tmp_path / "out.pt"
    target.write_bytes(b"old")
    with contextlib.suppress(KeyboardInterrupt), patcher().TemporaryFile(str(target)) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(torchgraft.GraftError, match="expected to be used within its `with` block"):
        file.keep()


def test_other_threads_run_while_an_update_waits_for_a_directory(tmp_path) -> None:
    """fcntl.flock() in this thread would wait for ever if the other held the GIL while it waits."""
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    begun = threading.Event()

    def update() -> None:
        begun.set()
        patcher().update_directory(str(tmp_path), {"config": b"new"}, [], "config", "", None)

    writer = threading.Thread(target=update)
    writer.start()
    begun.wait()
    time.sleep(0.1)
    assert not (tmp_path / "config").exists()
    os.close(holder)
    writer.join()
    assert (tmp_path / "config").read_bytes() == b"new"


def make_twins() -> list[torch.jit.ScriptModule]:
    """Two versions of one adapter: all its numbers are 1, or all are 2; the head's, too."""
    twins = []
    for number in (1, 2):
        model = torchgraft.add_head(
            torchgraft.graft(base("bert_sdpa", torch.float32), "lora[r=2]", "task", trainable=True),
            "task",
            torchgraft.HeadConfig(),
        )
        with torch.no_grad():
            for parameter in torchgraft.trainable_parameters(model, "task").values():
                parameter.fill_(number)
        twins.append(model)
    return twins


def version_of(directory: Path) -> int:
    read = torchgraft.load_adapter_directory(directory)
    numbers = {float(tensor.view(-1)[0]) for key, tensor in read.weights.items() if "lora_" in key}
    numbers |= {float(tensor.view(-1)[0]) for tensor in read.head.weights.values()}
    assert len(numbers) == 1, "of two versions"
    return int(numbers.pop())


def test_a_directory_is_read_as_one_version(tmp_path) -> None:
    """While another thread replaces the adapter all the time."""
    twins = make_twins()
    torchgraft.save_adapter(twins[0], "task", tmp_path)
    stop = threading.Event()

    def replace() -> None:
        turn = 1
        while not stop.is_set():
            torchgraft.save_adapter(twins[turn % 2], "task", tmp_path)
            turn += 1

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        versions = [version_of(tmp_path)]
        while sum(a != b for a, b in itertools.pairwise(versions)) < 10:  # the alarm ends it
            versions.append(version_of(tmp_path))
    finally:
        stop.set()
        writer.join()


@pytest.mark.slow(seconds=60)
def test_save_adapter_is_killed_at_any_instant(tmp_path) -> None:
    """The directory holds the old adapter, the new one, or none for the instant of renaming; nothing is left over."""
    twins = make_twins()
    source = random.Random(0)
    torchgraft.save_adapter(twins[0], "task", tmp_path)
    whole = sorted(path.name for path in tmp_path.iterdir())
    missing = 0
    for _ in range(150):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for turn in range(1_000_000):
                    torchgraft.save_adapter(twins[turn % 2], "task", tmp_path)
            os._exit(1)
        time.sleep(source.uniform(0.001, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (tmp_path / "adapter_config.json").exists():
            assert version_of(tmp_path) in (1, 2)
        else:
            missing += 1
        if source.random() < 0.3:
            torchgraft.save_adapter(twins[0], "task", tmp_path)
            assert sorted(path.name for path in tmp_path.iterdir()) == whole
            assert version_of(tmp_path) == 1
    assert missing < 75


@pytest.mark.slow(seconds=60)
def test_graft_is_killed_at_any_instant(tmp_path) -> None:
    """OUT.pt is the old file or the new one, and the next run removes what the killed ones left."""
    base_path, out = tmp_path / "base.pt", tmp_path / "out.pt"
    base("bert_sdpa", torch.float32).save(base_path)
    source = random.Random(1)

    def run(config: str) -> int:
        return run_here("graft.py", "add", base_path, "-o", out, "--config", config, "--name", config).returncode

    assert run("lora") == 0
    assert run("mam") == 0  # what a run takes is known from here on
    begun = time.monotonic()
    assert run("lora") == 0
    usual = time.monotonic() - begun
    for _ in range(25):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                run("mam")
            os._exit(0)
        time.sleep(source.uniform(usual / 2, usual * 1.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert torch.jit.load(out).adapter_names() in (["lora"], ["mam"])
    assert run("lora") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.pt", "out.pt"]


def test_a_directory_that_has_gone_is_an_error_not_a_wait(directory: Path) -> None:
    """The alarm ends whoever waits."""
    shutil.rmtree(directory)
    with pytest.raises(torchgraft.GraftError, match="not a directory"):
        torchgraft.load_adapter_directory(directory)
