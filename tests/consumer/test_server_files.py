"""examples/server and bad files: it starts, answers 422 with the adapter's name, waits for none, and ends in time."""

import contextlib
import json
import os
import re
import shutil
import subprocess

import pytest
import safetensors.torch
import torch

import torchgraft
from server_support import ADAPTERS, TOLERANCE, Server

DEEP = "[" * 400_000 + "]" * 400_000


def write_config(folder, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "adapter_config.json").write_text(text)


def config(**fields) -> str:
    return json.dumps({"config": fields, "name": "a"})


BAD_CONFIGS = {
    "deep": '{"config": ' + DEEP + "}",
    "deep-name": '{"name": ' + DEEP + "}",
    "number": '{"config": {"architecture": "lora", "alpha": 1e400}}',
    "half": '{"config": ',
    "cross": config(
        mh_adapter=False, output_adapter=False, cross_adapter=True, reduction_factor=2, non_linearity="relu"
    ),
    "no-layer": config(architecture="lora", leave_out=list(range(9))),
    "huge": config(architecture="lora", r=2**20),
    "huge-bottleneck": config(mh_adapter=True, output_adapter=True, reduction_factor=1e-300, non_linearity="relu"),
    "huge-prefix": config(architecture="prefix_tuning", prefix_length=2**40),
    "wrapped": config(architecture="lora", leave_out=[2**63]),
    "escape": config(architecture="\x1b[31m\x07\x9b31m"),
}


@pytest.mark.quick
def test_bad_configurations_keep_no_server_from_starting(server_program, models, own_adapters, expected):
    """Each is named in one line, and is an error of its own."""
    for name, text in BAD_CONFIGS.items():
        write_config(own_adapters, name, text)
        shutil.copy(own_adapters / "task-1" / "adapter.safetensors", own_adapters / name)
    with Server(server_program, models / "base.pt", own_adapters) as server:
        torch.testing.assert_close(server.outputs("task-1", [[1, 2]])[0], expected("task-1", [1, 2]), **TOLERANCE)
        for name in BAD_CONFIGS:
            for status, answer in (server.ask("PUT", f"/v1/adapters/{name}"), server.predict(name, [[1]])):
                assert status == 422 and f"adapter '{name}' cannot be loaded" in answer["error"]["message"], answer
            assert server.ask("GET", f"/v1/adapters/{name}")[0] in (200, 422)
        status, answer = server.ask("PUT", "/v1/adapters/number")
        assert "adapter_config.json: not JSON" in answer["error"]["message"]
        assert server.ask("GET", "/healthz")[0] == 200
        server.stop()
        lines = server.errors.splitlines()
    assert sorted(line.split()[1] for line in lines) == sorted(BAD_CONFIGS)
    assert all(line.startswith("adapter ") and " cannot be served: " in line and line.isprintable() for line in lines)


def test_files_that_cannot_be_read_are_named_at_the_start(server_program, models, own_adapters):
    """The start reads the header of each file of weights; one that does not match its size is damaged."""
    kinds = {"cut": "truncated", "gone": "no adapter.safetensors", "pickled": "torchgraft convert",
             "other": "not a safetensors file", "a b": "letters, digits, '_' and '-' only"}  # fmt: skip
    for name in kinds:
        shutil.copytree(own_adapters / "task-1", own_adapters / name)
    weights = {name: own_adapters / name / "adapter.safetensors" for name in kinds}
    os.truncate(weights["cut"], weights["cut"].stat().st_size - 1)
    weights["gone"].unlink()
    weights["pickled"].rename(weights["pickled"].with_name("pytorch_adapter.bin"))
    weights["other"].write_bytes(b"weights")
    with Server(server_program, models / "base.pt", own_adapters) as server:
        assert server.predict("task-1", [[1]])[0] == 200
        server.stop()
    lines = server.errors.splitlines()
    assert len(lines) == len(kinds)
    for name, what in kinds.items():
        shown = f"'{name}'" if " " in name else name
        (line,) = [line for line in lines if line.startswith(f"adapter {shown} cannot be served: ")]
        assert what in line


def test_help_shows_defaults(server_program):
    done = subprocess.run([server_program, "--help"], capture_output=True, text=True, check=True)
    shown = " ".join(done.stdout.split())
    for option in ("capacity", "workers", "max-batch", "max-wait-us", "max-queue", "max-tokens", "pad-id", "max-body",
                   "max-connections", "idle-seconds", "drain-seconds", "port", "max-adapter-bytes"):  # fmt: skip
        part = shown.split(f"--{option} ")[1].split(" --")[0]
        assert re.search(r"=\d+ |\[\d+\]", part), option  # by CLI11's version
    assert "127.0.0.1" in shown and "[]" not in shown and "--threads INT:from 1 threads" in shown


def test_an_adapter_of_the_folder_with_a_name_of_the_file_is_named(server_program, models, own_adapters, tmp_path):
    """The file's adapter is served; that the folder's is not is said at the start."""
    base = torch.jit.load(models / "base.pt")
    torchgraft.graft(base, adapters={"task-1": models / "adapters" / "task-0"}).save(str(tmp_path / "grafted.pt"))
    with Server(server_program, tmp_path / "grafted.pt", own_adapters) as server:
        assert server.ask("PUT", "/v1/adapters/task-1")[0] == 409
        server.stop()
        (line,) = server.errors.splitlines()
    assert line == "adapter task-1 of the model's file is served; that of the folder is not: rename one of the two"


def test_what_is_for_python_is_said_with_the_command(server_program, models, own_adapters):
    write_config(own_adapters, "peft", json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["query"]}))
    shutil.copytree(own_adapters / "task-1", own_adapters / "pickled")
    (own_adapters / "pickled" / "adapter.safetensors").rename(own_adapters / "pickled" / "pytorch_adapter.bin")
    with Server(server_program, models / "base.pt", own_adapters) as server:
        answers = {name: server.ask("PUT", f"/v1/adapters/{name}") for name in ("peft", "pickled")}
        server.stop()
    assert [status for status, _ in answers.values()] == [422, 422]
    assert "an adapter of PEFT, which is read in Python: torchgraft load" in answers["peft"][1]["error"]["message"]
    assert "torchgraft convert" in answers["pickled"][1]["error"]["message"]
    assert "adapter peft cannot be served: " in server.errors and "an adapter of PEFT" in server.errors


def test_another_method_and_a_fuse_in_the_file_are_named(server_program, models, own_adapters, tmp_path):
    write_config(own_adapters, "prompt", config(architecture="soft_prompt", prompt_length=3))
    with Server(server_program, models / "base.pt", own_adapters) as server:
        status, answer = server.ask("PUT", "/v1/adapters/prompt")
        assert status == 422 and '"soft_prompt" is not supported' in answer["error"]["message"]
        server.stop()
    (line,) = server.errors.splitlines()
    assert line.startswith("adapter prompt cannot be served: ")

    module = torchgraft.graft(torch.jit.load(models / "base.pt"), "seq_bn[reduction_factor=2]", "a", verify=False)
    module = torchgraft.compose(module, "twice", "Stack(a, a)", verify=False)
    module.save(str(tmp_path / "composed.pt"))
    with Server(server_program, tmp_path / "composed.pt", None) as server:
        module.activate("twice")
        with torch.inference_mode():
            twice = module(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.int64))[:, 0]
        torch.testing.assert_close(server.outputs("twice", [[1, 2]]), twice, rtol=0, atol=1e-5)
    module = torchgraft.graft(module, "seq_bn[reduction_factor=2]", "b", verify=False)
    module = torchgraft.add_adapter_fusion(module, ["a", "b"])
    torchgraft.compose(module, "fused", "Fuse(a, b)", verify=False).save(str(tmp_path / "fused.pt"))
    command = [server_program, tmp_path / "fused.pt", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "'fused': Fuse(a, b) needs AdapterFusion layers, which no pool holds yet" in done.stderr


def test_a_file_that_is_no_module_is_named_as_what_it_is(server_program, models, tmp_path):
    module = torch.jit.load(models / "base.pt")
    tensors = dict(module.state_dict())
    torch.save(tensors, tmp_path / "state.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, tmp_path / "weights.safetensors")
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "program.pt2")
    (tmp_path / "text.pt").write_text("no model")
    kinds = {
        "state.pt": "it is what torch.save() wrote, a state dict or a pickled model",
        "old.pt": "it is what torch.save() of an older release wrote",
        "weights.safetensors": "it is tensors alone, of safetensors",
        "program.pt2": "it is an exported program of torch.export",
        "text.pt": "it is of an unknown kind",
    }
    for name, kind in kinds.items():
        done = subprocess.run(
            [server_program, tmp_path / name, "--adapters", models / "adapters", "--port", "0"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 1 and done.stderr.startswith("server: ") and kind in done.stderr, done.stderr
        assert "miniz" not in done.stderr


@pytest.mark.parametrize("text", ["{", "[]", "null", DEEP, '{"config": {"head_type": "tagging", "num_labels": 1e400}}'])
def test_a_damaged_head_is_no_missing_head(server_program, models, own_adapters, text):
    """Else predictions would be hidden states."""
    base = torch.jit.load(models / "base.pt")
    model = torchgraft.graft(base, adapters={"headed": models / "adapters" / "task-0"}, gate_pooling="unpadded")
    torchgraft.save_adapter(
        torchgraft.add_head(model, "headed", torchgraft.HeadConfig()), "headed", own_adapters / "headed"
    )
    with Server(server_program, models / "base.pt", own_adapters) as server:
        assert "logits" in server.predict("headed", [[1]])[1]
        (own_adapters / "headed" / "head_config.json").write_text(text)
        status, answer = server.ask("PUT", "/v1/adapters/headed")
        assert status == 422 and "head" in answer["error"]["message"], answer
        assert "logits" in server.predict("headed", [[1]])[1]  # the one in memory stays


def fifo(path) -> None:
    os.mkfifo(path)


def device(path) -> None:
    path.symlink_to("/dev/zero")


def loop(path) -> None:
    path.symlink_to(path)


def sparse(path) -> None:
    path.touch()
    os.truncate(path, 3 << 30)


@pytest.mark.parametrize("file", ["adapter.safetensors", "head_config.json", "adapter_config.json"])
@pytest.mark.parametrize("put", [fifo, device, loop, sparse, os.mkdir])
def test_what_is_no_regular_file_is_not_waited_for(server_program, models, own_adapters, file, put):
    path = own_adapters / "task-1" / file
    with Server(server_program, models / "base.pt", own_adapters) as server:
        path.unlink(missing_ok=True)
        put(path)
        # Without a regular adapter_config.json a directory is no adapter.
        expected = 404 if file == "adapter_config.json" and put is not sparse else 422
        status, answer = server.ask("PUT", "/v1/adapters/task-1")
        assert status == expected, answer
        assert expected == 404 or file in answer["error"]["message"]
        assert server.predict("task-2", [[1]])[0] == 200
        assert server.stop() == 0


@contextlib.contextmanager
def full_pipe():
    """Its two ends. Nobody reads, so that the next write() waits."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b" " * 4096)
    os.set_blocking(writing, True)
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


def test_a_stderr_that_nobody_reads_stops_nothing(server_program, models, own_adapters, waits_at_open):
    """Neither the start, nor answers, nor the end."""
    write_config(own_adapters, "half", BAD_CONFIGS["half"])
    gate = own_adapters / "task-1" / "adapter.safetensors.wait"
    with full_pipe() as (reading, writing):
        options = ("--drain-seconds", 1)
        more = {"environment": waits_at_open, "log": writing}
        server = Server(server_program, models / "base.pt", own_adapters, *options, **more)
        with server, contextlib.closing(server.connection()) as connection:
            assert server.predict("task-0", [[1]])[0] == 200
            assert server.ask("PUT", "/v1/adapters/half")[0] == 422
            gate.touch()
            connection.request("PUT", "/v1/adapters/task-1")
            assert server.predict("task-0", [[1]])[0] == 200
            os.read(reading, 8192)  # room for a line
            assert server.stop() == 1
        os.set_blocking(reading, False)
        logged = os.read(reading, 1 << 20)
    assert b"1 lines before this one are missing\nserver: gave up waiting" in logged


def test_a_large_file_of_weights_is_refused(server_program, models, own_adapters):
    size = (own_adapters / "task-1" / "adapter.safetensors").stat().st_size
    options = ("--max-adapter-file-bytes", size - 1)
    with Server(server_program, models / "base.pt", own_adapters, *options) as server:
        status, answer = server.ask("PUT", "/v1/adapters/task-1")
        assert status == 422 and f"expected a file of at most {size - 1} bytes" in answer["error"]["message"]


def test_a_read_that_never_ends_holds_up_no_end(server_program, models, own_adapters, waits_at_open):
    """Nor those who ask for other things meanwhile."""
    options = ("--drain-seconds", 1)
    gate = own_adapters / "task-1" / "adapter.safetensors.wait"
    with (
        Server(server_program, models / "base.pt", own_adapters, *options, environment=waits_at_open) as server,
        contextlib.closing(server.connection()) as connection,
    ):
        assert server.predict("task-0", [[1]])[0] == 200
        gate.touch()
        connection.request("PUT", "/v1/adapters/task-1")
        assert server.predict("task-0", [[1]])[0] == 200
        assert len(server.ask("GET", "/v1/adapters")[1]["adapters"]) == ADAPTERS
        assert server.ask("GET", "/v1/adapters/task-2")[0] == 200
        assert server.stop() == 1  # or Server.wait() gives up
        assert "gave up waiting" in server.errors


def test_adapters_in_memory_are_served_while_the_folder_is_away(server_program, models, own_adapters, expected):
    row, away = [3, 4, 5], own_adapters.with_name("away")
    with Server(server_program, models / "base.pt", own_adapters) as server:
        server.outputs("task-1", [row])
        own_adapters.rename(away)
        torch.testing.assert_close(server.outputs("task-1", [row])[0], expected("task-1", row), **TOLERANCE)
        torch.testing.assert_close(server.outputs(None, [row])[0], expected(None, row), **TOLERANCE)
        assert server.predict("task-2", [row])[0] == 404
        away.rename(own_adapters)
        torch.testing.assert_close(server.outputs("task-2", [row])[0], expected("task-2", row), **TOLERANCE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapters", "nowhere"], "--adapters: Directory does not exist: nowhere"),
        ([], "--adapters: base.pt has no adapters; give the folder of some"),
        (["--adapters", "adapters", "--nosuch"], "--nosuch"),
        (["--adapters", "adapters", "--capacity", "0"], "--capacity: expected an integer from 1, got 0 ("),
        (["--capacity", "9" * 20], "--capacity: expected an integer from 1 to 9223372036854775807, got 9999999999999"),
        (["--capacity", "0x10"], "--capacity: expected an integer from 1, got 0x10 ("),
        (["--workers", "65"], "--workers: expected an integer from 1 to 64, got 65 ("),
        (["--port", "many"], "--port: expected an integer from 0, got many ("),
        (["--port", "65536"], "--port: expected an integer from 0 to 65535, got 65536 ("),
        (["--drain-seconds", "-1"], "--drain-seconds: expected an integer from 0, got -1 ("),
        (["--max-wait-us", "9223372036854775807"], "--max-wait-us: expected an integer from 0 to 3600000000, got 92"),
        (["--adapters", "adapters", "--max-queue", "8"], "--max-queue"),
        (["--adapters", "adapters", "--layers", "2"], "--layers: the model is an encoder of texts"),
        (["--adapters", "adapters", "--mask-of-tokens"], "--mask-of-tokens: the model is an encoder of texts"),
        (["--adapters", "adapters", "--max-cache-bytes", "9999"], "--max-cache-bytes: the model is an encoder"),
        (["--heads", "65537"], "--heads: expected an integer from 1 to 65536, got 65537 ("),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(server_program, models, words, message):
    command = [str(server_program), "base.pt", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=models)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert message in result.stderr and result.stderr.endswith(" (server --help)\n")


def test_a_grafted_model_is_served_without_a_folder(server_program, models, expected, tmp_path, monkeypatch):
    """It looks into no folder, the one that it was started in neither."""
    base = torch.jit.load(models / "base.pt")
    directory = {"own": models / "adapters" / "task-0"}
    torchgraft.graft(base, adapters=directory, gate_pooling="unpadded").save(tmp_path / "grafted.pt")
    monkeypatch.chdir(models / "adapters")
    row = [9, 8, 7, 6]
    with Server(server_program, tmp_path / "grafted.pt", None) as server:
        torch.testing.assert_close(server.outputs("own", [row])[0], expected("task-0", row), **TOLERANCE)
        torch.testing.assert_close(server.outputs(None, [row])[0], expected(None, row), **TOLERANCE)
        assert [info["name"] for info in server.ask("GET", "/v1/adapters")[1]["adapters"]] == ["own"]
        for method, path in (("GET", "task-1"), ("PUT", "task-1"), ("DELETE", "task-1")):
            assert server.ask(method, f"/v1/adapters/{path}")[0] == 404
        assert server.predict("task-1", [row])[0] == 404
        status, answer = server.ask("PUT", "/v1/adapters/new")
        assert status == 404 and "has no folder of adapters; start it with --adapters" in answer["error"]["message"]
        assert server.stop() == 0
