"""Compositions in examples/server: named by a directory, or given in the request. Each answer is that of a module with
compose()."""

import functools
import json
import shutil
import subprocess
import threading

import pytest
import torch

import torchgraft
from server_support import TOLERANCE, Server, save_random_adapter
from torchgraft.composition import adapters_of, composition_to_json

ROWS = [[1, 2, 3], [4, 5]]
STACK = "Stack(task-4, task-9)"
BOTH = {"a": "seq_bn[reduction_factor=4]", "b": "seq_bn[reduction_factor=2]"}


@pytest.fixture
def composed(models):
    """The hidden states of the first tokens that a module with this composition gives."""

    @functools.cache
    def answer(text: str, folder=models / "adapters") -> torch.Tensor:
        module = torch.jit.load(models / "base.pt")
        for name in adapters_of(json.loads(composition_to_json(text))):
            module = torchgraft.load_adapter(module, folder / name, name, verify=False)
        module = torchgraft.compose(module, "whole", text, verify=False)
        module.activate("whole")
        with torch.inference_mode():
            return torch.stack([module(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64))[0, 0]
                                for row in ROWS])  # fmt: skip

    return answer


def save_setup(models, directory, text: str, seed: int) -> None:
    """A composition of fresh adapters "a" and "b"."""
    base, module = torch.jit.load(models / "base.pt"), torch.jit.load(models / "base.pt")
    for index, (name, config) in enumerate(BOTH.items()):
        save_random_adapter(base, directory.parent.parent / f"made_{seed}" / name, config, 2 * seed + index)
        module = torchgraft.load_adapter(module, directory.parent.parent / f"made_{seed}" / name, name, verify=False)
    module = torchgraft.compose(module, "both", text, verify=False)
    torchgraft.save_adapter_setup(module, "both", directory, overwrite=True)


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(got, expected, **TOLERANCE)


def test_compositions_in_requests_and_in_the_folder(server_program, models, own_adapters, composed, expected):
    save_setup(models, own_adapters / "both", "Stack(a, b)", 1)
    save_setup(models, own_adapters.parent / "other" / "both", "Average(a, b)", 2)
    with Server(server_program, models / "base.pt", own_adapters, "--capacity", 4) as server:
        for text in (
            STACK,
            "Stack(task-9, task-4)",
            "Average(task-4, task-9, weights=[0.3, 0.7])",
            "Stack(task-1, task-6)",
        ):
            torch.testing.assert_close(server.outputs(text, ROWS), composed(text), **TOLERANCE)
        alone = torch.stack([expected("task-4", row) for row in ROWS])
        torch.testing.assert_close(server.outputs("task-4", ROWS), alone, **TOLERANCE)
        assert {"name": "both", "resident": False} in server.ask("GET", "/v1/adapters")[1]["adapters"]
        both = composed("Stack(a, b)", own_adapters / "both")
        torch.testing.assert_close(server.outputs("both", ROWS), both, **TOLERANCE)
        assert {"name": "both", "resident": True} in server.ask("GET", "/v1/adapters")[1]["adapters"]
        status, answer = server.ask("GET", "/v1/adapters/both")
        assert status == 200 and answer["config"] == torchgraft.Stack("a", "b").to_dict()
        shutil.rmtree(own_adapters / "both")
        shutil.copytree(own_adapters.parent / "other" / "both", own_adapters / "both")
        assert server.ask("PUT", "/v1/adapters/both") == (200, {"name": "both", "resident": True})
        other = composed("Average(a, b)", own_adapters / "both")
        torch.testing.assert_close(server.outputs("both", ROWS), other, **TOLERANCE)
        assert server.metric("torchgraft_compositions") > 0
        assert server.metric('torchgraft_adapter_requests_total{adapter="(composition)"}') == 4
        assert server.ask("DELETE", "/v1/adapters/both")[0] == 200
        assert server.predict("both", ROWS)[0] == 404
        assert server.ask("PUT", "/v1/adapters/both")[0] == 200
        torch.testing.assert_close(server.outputs("both", ROWS), other, **TOLERANCE)
        shutil.rmtree(own_adapters / "both")
        shutil.copytree(own_adapters / "task-4", own_adapters / "both")  # an adapter of that name
        assert server.ask("PUT", "/v1/adapters/both")[0] == 200
        torch.testing.assert_close(server.outputs("both", ROWS), alone, **TOLERANCE)
        assert server.stop() == 0
    assert server.errors == ""


def test_a_composition_of_the_file_goes_before_one_of_the_folder(
    server_program, models, own_adapters, composed, tmp_path
):
    """As an adapter of the file does: it is listed, kept, and comes back when others have taken its place."""
    module = torch.jit.load(models / "base.pt")
    for name in ("task-4", "task-9"):
        module = torchgraft.load_adapter(module, own_adapters / name, name, verify=False)
    module = torchgraft.compose(module, "task-1", "Stack(task-4, task-9)", verify=False)
    torchgraft.compose(module, "en ner", "Average(task-4, task-9)", verify=False).save(str(tmp_path / "both.pt"))
    with Server(server_program, tmp_path / "both.pt", own_adapters, "--max-compositions", 1) as server:
        for _ in range(2):
            for name, text in {"task-1": STACK, "en ner": "Average(task-4, task-9)"}.items():
                torch.testing.assert_close(server.outputs(name, ROWS), composed(text), **TOLERANCE)
            torch.testing.assert_close(server.outputs("Stack(task-9, task-4)", ROWS),
                                       composed("Stack(task-9, task-4)"), **TOLERANCE)  # fmt: skip
        own = (409, "adapter 'task-1' is part of the model's file")
        for method in ("PUT", "DELETE"):
            status, answer = server.ask(method, "/v1/adapters/task-1")
            assert (status, answer["error"]["message"]) == own
        assert server.ask("GET", "/v1/adapters/task-1")[1]["config"] == torchgraft.Stack("task-4", "task-9").to_dict()
        names = [info["name"] for info in server.ask("GET", "/v1/adapters")[1]["adapters"]]
        assert names == sorted({*names, "en ner", "task-1"})
        status, answer = server.predict("Stack(task-1, task-4)", ROWS)
        assert status == 422 and "uses 'task-1', which is a composition" in answer["error"]["message"]
        assert server.stop() == 0
    started = [line for line in server.errors.splitlines() if "task-1" in line]
    assert started == ["adapter task-1 of the model's file is served; that of the folder is not: rename one of the two"]


def test_a_file_with_the_text_of_a_composition_as_a_name_is_refused(server_program, models, tmp_path):
    module = torchgraft.graft(torch.jit.load(models / "base.pt"), "lora", "Stack(a, b)", verify=False)
    module.save(str(tmp_path / "named.pt"))
    done = subprocess.run([server_program, tmp_path / "named.pt", "--port", "0"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "'Stack(a, b)' cannot be a name: it is the text of a composition" in done.stderr


def test_what_is_no_composition_that_it_can_run_is_named(server_program, models, own_adapters):
    (own_adapters / "damaged").mkdir()
    (own_adapters / "damaged" / "adapter_setup.json").write_text("{")
    wrong = {
        "Stack(task-4": (400, "composition: expected a comma or a closing bracket"),
        "Stack(task-4, none)": (404, "no adapter is called 'none'"),
        "Stack(task-4, ../secret)": (400, "composition: expected"),
        "Stack(task-4, '../secret')": (404, "expected an adapter's name"),
        "Stack(task-0, task-5)": (422, "gates that are means over real tokens only"),
        "Fuse(task-4, task-9)": (422, "AdapterFusion layers, which no pool holds yet"),
        "Parallel(task-4, task-9)": (422, "no pool holds a Parallel; acquire each of its parts"),
        "MultiTask(task-4, task-9)": (422, "no pool holds a MultiTask; acquire for each row the part of its task"),
        "Stack(task-4, task-4, task-9)": (422, "at most 2 adapters in a composition, got 3"),
        "Stack(task-4, damaged)": (422, "'damaged' is a composition, which cannot be part of another"),
        "Split(task-4, task-9, splits=[1, 1])": (422, "the given input has sequence length 3"),
        f"Stack({'a' * 1100})": (400, "at most 1024 characters"),
        "damaged": (422, "adapter_setup.json"),
        "Stacks(task-4)": (404, "expected an adapter's name"),
    }
    options = ["--max-composition-parts", 2]
    with Server(server_program, models / "base.pt", own_adapters, *options) as server:
        for text, (status, message) in wrong.items():
            got, answer = server.predict(text, ROWS)
            assert got == status and message in answer["error"]["message"], (text, answer)
        assert server.predict("Split(task-4, task-9, splits=[1, 2])", ROWS)[0] == 200
        assert server.ask("DELETE", "/v1/adapters/damaged")[0] == 200
        server.stop()
    (line,) = server.errors.splitlines()
    assert line.startswith("adapter damaged cannot be served: ")
    with Server(server_program, models / "base.pt", own_adapters, "--max-compositions", 0) as server:
        status, answer = server.predict(STACK, ROWS)
        assert status == 422 and "raise max_compositions" in answer["error"]["message"]
        assert server.predict("task-4", ROWS)[0] == 200


def test_a_composition_is_of_one_version_while_it_is_replaced(server_program, models, own_adapters, composed):
    for seed in (1, 2):
        save_setup(models, own_adapters.parent / f"version_{seed}" / "both", "Stack(a, b)", seed)
    versions = [own_adapters.parent / f"version_{seed}" / "both" for seed in (1, 2)]
    right = [composed("Stack(a, b)", version) for version in versions]
    assert not close(*right)
    modules = [torchgraft.load_adapter_setup(torch.jit.load(models / "base.pt"), version, "both", verify=False)
               for version in versions]  # fmt: skip
    torchgraft.save_adapter_setup(modules[0], "both", own_adapters / "both")
    wrong, seen = [], set()
    with Server(server_program, models / "base.pt", own_adapters, "--capacity", 5) as server:
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                status, answer = server.predict("both", ROWS)
                found = [i for i in (0, 1) if status == 200 and close(torch.tensor(answer["outputs"]), right[i])]
                seen.update(found)
                if not found:
                    wrong.append(answer)
                server.predict(STACK, ROWS)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for i in range(8):
            torchgraft.save_adapter_setup(modules[(i + 1) % 2], "both", own_adapters / "both", overwrite=True)
            assert server.ask("PUT", "/v1/adapters/both")[0] == 200
        done.set()
        for thread in threads:
            thread.join()
        assert server.stop() == 0
    changed = "its files are not those that were loaded"  # an evicted adapter of the old version, before the PUT
    assert not [answer for answer in wrong if changed not in str(answer) and "replaced meanwhile" not in str(answer)]
    assert seen == {0, 1}
