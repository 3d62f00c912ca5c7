"""examples/server while those who write its adapters are killed: an answer is of one version, or an error."""

import contextlib
import os
import random
import signal
import time

import pytest
import torch

import torchgraft
from server_support import TOLERANCE, Server

ROW = [3, 1, 4, 1, 5]


def versions_of(models) -> list[torch.jit.ScriptModule]:
    """Two modules with an adapter "task" whose numbers differ everywhere."""
    base, versions = torch.jit.load(models / "base.pt"), []
    for seed in range(2):
        model = torchgraft.graft(base, "lora[r=4]", "task", gate_pooling="unpadded")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.adapters.parameters():
                parameter.copy_(torch.randn_like(parameter))
        versions.append(model)
    return versions


def answer_of(model: torch.jit.ScriptModule) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ROW]), torch.ones(1, len(ROW), dtype=torch.int64))[0, 0]


@pytest.mark.slow(seconds=90)
def test_put_while_writers_are_killed(server_program, models, own_adapters):
    versions = versions_of(models)
    wanted = [answer_of(model) for model in versions]
    assert not torch.allclose(*wanted, atol=0.01)
    task, source, seen = own_adapters / "task", random.Random(0), set()
    begun = time.monotonic()
    torchgraft.save_adapter(versions[0], "task", task)
    longest = max(0.2, 4 * (time.monotonic() - begun))  # on a busy machine a save takes seconds
    with Server(server_program, models / "base.pt", own_adapters) as server:
        for _ in range(100):
            first = source.randrange(2)  # on a busy machine it may not come to a second one
            writer = os.fork()
            if writer == 0:
                with contextlib.suppress(BaseException):
                    for turn in range(first, 1_000_000):
                        torchgraft.save_adapter(versions[turn % 2], "task", task)
                os._exit(1)
            end = time.monotonic() + source.uniform(0.005, longest)
            while time.monotonic() < end:
                assert server.ask("PUT", "/v1/adapters/task")[0] in (200, 404)
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
            status, _ = server.ask("PUT", "/v1/adapters/task")
            assert status == (200 if (task / "adapter_config.json").exists() else 404)
            got = server.outputs("task", [ROW])[0]  # of this version, or of the one before
            fitting = [number for number, each in enumerate(wanted) if torch.allclose(got, each, **TOLERANCE)]
            assert len(fitting) == 1
            seen |= set(fitting)
        torchgraft.save_adapter(versions[1], "task", task)
        assert server.ask("PUT", "/v1/adapters/task")[0] == 200
        torch.testing.assert_close(server.outputs("task", [ROW])[0], wanted[1], **TOLERANCE)
    assert seen == {0, 1}
    assert not list(task.glob(".*"))


@pytest.mark.slow(seconds=60)
def test_a_server_that_is_killed_under_load_starts_again(server_program, models, own_adapters, expected):
    source = random.Random(1)
    files = sorted(path.relative_to(own_adapters) for path in own_adapters.rglob("*"))
    for _ in range(8):
        server = Server(server_program, models / "base.pt", own_adapters)
        children = []
        for number in range(3):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    while True:
                        server.ask("PUT", f"/v1/adapters/task-{number}")
                        server.predict(f"task-{number}", [ROW])
                os._exit(0)
            children.append(child)
        time.sleep(source.uniform(0.05, 1))
        os.kill(server.pid, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        assert server.wait() == -signal.SIGKILL
    with Server(server_program, models / "base.pt", own_adapters) as server:
        torch.testing.assert_close(server.outputs("task-1", [ROW])[0], expected("task-1", ROW), **TOLERANCE)
    assert sorted(path.relative_to(own_adapters) for path in own_adapters.rglob("*")) == files
