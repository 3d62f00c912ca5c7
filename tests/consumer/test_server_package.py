"""examples/server with an AOTInductor package: the answers are those of the module, and so are the faults."""

import concurrent.futures
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch

import torchgraft
from hosts_support import attempt
from server_support import ADAPTERS, CAPACITY, TOLERANCE, Encoder, Server, save_random_adapter

# These run here with a server whose forward passes are the package's.
from test_server import (  # noqa: F401
    name_of,
    random_row,
    test_adapters_come_and_go_without_a_restart,
    test_an_adapter_with_a_head_answers_logits,
    test_clients_that_go_away,
    test_each_adapter_alone,
    test_more_than_the_queue_holds_is_refused,
    test_names_are_never_paths,
    test_one_request_that_fails_spoils_no_other,
    test_other_addresses,
    test_requests_of_all_adapters_at_once,
    test_rows_of_one_request_are_padded_without_effect,
    test_sigterm_under_load_loses_nothing,
    test_what_is_wrong_is_said,
)

pytestmark = pytest.mark.slow(seconds=20)


@pytest.fixture(scope="session")
def package(models: Path) -> Path:
    """A package of models/base.pt with CAPACITY rows for the adapters of models/adapters."""
    base = torch.jit.load(models / "base.pt")
    room = [torchgraft.adapter_hub.load_adapter_directory(path).config for path in (models / "adapters").iterdir()]
    pool = torchgraft.AdapterPool(base, CAPACITY, room, max_compositions=0)
    ids = torch.ones(2, 7, dtype=torch.int64)
    torchgraft.compile_package(torchgraft.export(pool, (ids, ids)), models / "base.aoti.pt2")
    return models / "base.aoti.pt2"


@pytest.fixture(scope="module", name="server_program")
def server_with_package(server_program: Path, package: Path) -> list:
    """In place of the program that other files start."""
    return [server_program, "--package", package]


def test_an_adapter_is_replaced_under_load(server_program, models, own_adapters, expected):
    """Each answer is of the one or of the other; what is asked after a replacement is of the new one."""
    row, late = [4, 5, 6, 7], own_adapters / "late"
    answers = [expected(name, row) for name in ("task-0", "task-2")]
    assert (answers[0] - answers[1]).abs().max() > 0.01
    shutil.copytree(own_adapters / "task-0", late)
    stop = threading.Event()
    with Server(server_program, models / "base.pt", own_adapters) as server:

        def client(_: int) -> int:
            count = 0
            while not stop.is_set():
                got = server.outputs("late", [row])[0]
                assert min((got - answer).abs().max() for answer in answers) <= TOLERANCE["atol"]
                count += 1
            return count

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client, seed) for seed in range(4)]
            try:
                for turn in range(1, 20):
                    shutil.copytree(own_adapters / f"task-{2 * (turn % 2)}", late, dirs_exist_ok=True)
                    assert server.ask("PUT", "/v1/adapters/late")[0] == 200
                    torch.testing.assert_close(server.outputs("late", [row])[0], answers[turn % 2], **TOLERANCE)
            finally:
                stop.set()
            assert all(each.result() > 0 for each in clients)


def test_one_answer_with_and_without_the_package(server_program, models):
    """Mixed batches, also of two forward passes at once, beside the server that has no package."""
    source = random.Random(5)
    requests = [(name_of(source.randrange(-1, ADAPTERS)), random_row(source)) for _ in range(60)]
    options = ["--workers", 2, "--max-wait-us", 20_000]
    answers = []
    for program in (server_program[:1], server_program):
        with Server(program, models / "base.pt", models / "adapters", *options) as server:
            with concurrent.futures.ThreadPoolExecutor(12) as pool:
                answers.append(torch.cat(list(pool.map(lambda each: server.outputs(each[0], [each[1]]), requests))))
            assert server.metric("torchgraft_batch_rows_sum") > server.metric("torchgraft_batch_rows_count")
    torch.testing.assert_close(answers[1], answers[0], **TOLERANCE)


def test_what_has_no_place_in_the_banks(server_program, models, own_adapters):
    base = torch.jit.load(models / "base.pt")
    save_random_adapter(base, own_adapters / "wide", "lora[r=64]", 3)
    with Server(server_program, models / "base.pt", own_adapters) as server:
        status, answer = server.predict("wide", [[1, 2]])
        assert status == 422 and "does not fit into the banks, which are fixed" in answer["error"]["message"]
        status, answer = server.predict("Stack(task-1, task-4)", [[1, 2]])
        assert status == 422 and "a server with --package runs none" in answer["error"]["message"]
        assert server.predict("task-1", [[1, 2]])[0] == 200
        assert server.stop() == 0
    assert "adapter wide cannot be served: there is no room for lora_a" in server.errors
    assert "make the package for its configuration, too" in server.errors


def _refused(program: list, model: Path, *options: object) -> str:
    done = attempt(*program, model, "--adapters", model.parent / "adapters", "--port", 0, *options)
    assert done.returncode in (1, 2) and done.stderr.startswith("server: ")
    return done.stderr


def test_a_package_of_another_version_of_the_model(server_program, models):
    """One number of one token's embedding differs, which no request of the check need read."""
    other = torch.jit.load(models / "base.pt")
    with torch.no_grad():
        next(iter(other.parameters()))[-1, 0] += 1.0
    other.save(models / "version.pt")
    refused = _refused(server_program, models / "version.pt")
    assert "the base's weights are not those that it was made of" in refused


def test_a_model_with_an_adapter_that_the_package_does_not_know(server_program, models):
    own = torchgraft.graft(torch.jit.load(models / "base.pt"), "lora[r=2, output_lora=True]", "own", verify=False)
    own.save(models / "own.pt")
    assert "where the model has adapters: it was made of another model" in _refused(server_program, models / "own.pt")


def test_a_package_of_another_model(server_program, models):
    torch.manual_seed(1)
    ids = torch.ones(2, 8, dtype=torch.int64)
    model = Encoder().eval()
    torch.jit.trace(model, (ids, ids), check_trace=False).save(models / "other.pt")
    assert "the base's weights are not those that it was made of" in _refused(server_program, models / "other.pt")


def test_options_that_the_package_has_fixed(server_program, models):
    base = models / "base.pt"
    assert "--capacity: the package has rows for 5 adapters, got 6" in _refused(server_program, base, "--capacity", 6)
    said = _refused(server_program, base, "--max-compositions", 2)
    assert "--max-compositions: a package runs no compositions" in said
    said = _refused(server_program, base, "--gate-pooling", "all")
    assert "--gate-pooling: the package's gates are means over unpadded tokens, got all" in said
