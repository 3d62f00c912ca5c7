"""What is not supported is refused by its name, with what to do instead: from Python and from the command line.

The patcher in C++: tests/cpp/config/test_composition.cpp, test_adapter_config.cpp, tests/cpp/patch/test_train.cpp.
Servers: tests/consumer/test_server_files.py, test_ray_encoder.py.
"""

import json
import re
from pathlib import Path

import pytest
import torch

import torchgraft
from scripts_here import run_here
from torchgraft import AdapterPool, Fuse, MultiTask, Parallel, Stack

pytestmark = pytest.mark.quick

FUSE = "Fuse is for bottlenecks, and the adapters library has MultiTask for LoRAs only; compose them under"
COMPOSITION = "it holds a composition (adapter_setup.json), not an adapter; load_adapter_setup"


@pytest.fixture(scope="module")
def base() -> torch.jit.ScriptModule:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return torch.jit.script(torch.nn.TransformerEncoder(layer, 2).eval())


@pytest.fixture(scope="module")
def model(base) -> torch.jit.ScriptModule:
    module = torchgraft.graft(base, "seq_bn[reduction_factor=2]", "en", verify=False)
    return torchgraft.graft(module, "seq_bn[reduction_factor=4]", "ner", verify=False)


@pytest.fixture(scope="module")
def composed(model) -> torch.jit.ScriptModule:
    return torchgraft.compose(model, "en_ner", Stack("en", "ner"), verify=False)


@pytest.fixture(scope="module")
def files(base, model, composed, tmp_path_factory) -> Path:
    """base.pt, model.pt, composed.pt and the directory setup."""
    folder = tmp_path_factory.mktemp("files")
    for name, module in (("base", base), ("model", model), ("composed", composed)):
        module.save(str(folder / f"{name}.pt"))
    torchgraft.save_adapter_setup(composed, "en_ner", folder / "setup")
    return folder


def check_refused(call, *messages: str) -> None:
    with pytest.raises(torchgraft.GraftError) as error:
        call()
    assert all(message in str(error.value) for message in messages), error.value


def check_command(*words: object, says: tuple[str, ...]) -> None:
    done = run_here("graft.py", *words)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert all(message in done.stderr for message in says), done.stderr


BLOCKS = [(MultiTask(Fuse("en", "ner"), "en"), "MultiTask(Fuse(en, ner), en)", FUSE)]


@pytest.mark.parametrize(("block", "named", "message"), BLOCKS, ids=lambda value: str(value)[:40])
def test_blocks_that_no_module_runs(block, named: str, message: str, model, files: Path, tmp_path: Path) -> None:
    check_refused(lambda: torchgraft.compose(model, "c", block), f"compose: {named}: {message}")
    text = re.sub(r"'", "", repr(block))
    check_refused(lambda: torchgraft.compose(model, "c", text), f"compose: {named}: {message}")
    out = tmp_path / "out.pt"
    check_command("compose", files / "model.pt", "-o", out, "--name", "c", text, says=(named, message))
    # A setup of the library: it is refused before a directory of its adapters, which are not there, is read.
    setup = {"adapter_setup": block.to_dict(), "head_setup": None, "version": "adapters.1.3.0"}
    (tmp_path / "adapter_setup.json").write_text(json.dumps(setup))
    check_refused(
        lambda: torchgraft.load_adapter_setup(model, tmp_path, "c"), f"load_adapter_setup: {named}: {message}"
    )
    assert not out.exists()


def test_the_remedy_for_parallel_in_pools(model) -> None:
    """Every row once for each part. Pools and caches have no other way."""
    x = torch.randn(2, 5, 16)
    module = torchgraft.compose(model, "both", Stack("en", "ner"), verify=False)
    ids = torch.tensor([1, 1, 2, 2])  # Parallel("ner", Stack("en", "ner"))
    with torch.no_grad():
        found = module(x.repeat(2, 1, 1), adapter_ids=ids)
        for row, name in ((0, "ner"), (2, "both")):
            module.activate(name)
            torch.testing.assert_close(found[row : row + 2], module(x))


def test_parallel_where_rows_cannot_be_repeated(model) -> None:
    both = torchgraft.compose(model, "both", Parallel("en", "ner"), verify=False)
    remedy = "no pool holds a Parallel; acquire each of its parts, and repeat the rows for each"
    check_refused(lambda: AdapterPool(both, 8), f"'both': {remedy}")
    check_refused(lambda: AdapterPool(model, 8).acquire(["Parallel(en, ner)"]), remedy)
    check_refused(lambda: torchgraft.export(both, (torch.randn(2, 5, 16),)), "export: the module has compositions")


def test_names_and_capacities_of_pools(base, model, tmp_path: Path) -> None:
    pool = AdapterPool(model, 8)
    check_refused(lambda: pool.compose("en", Stack("en", "ner")), "uses the adapter 'en' and cannot have the same name")
    torchgraft.save_adapter(model, "en", tmp_path / "en")
    pool = AdapterPool(base, 1)
    pool.insert("en", tmp_path / "en")
    check_refused(lambda: pool.acquire(["Stack(en, ner)"]), "has 2 adapters, and the pool holds at most 1 at once")


def test_a_bank_that_somebody_wrote_over(model) -> None:
    noisy = torchgraft.rename_adapter(model, "en", "english")
    with torch.no_grad():
        for name, bank in noisy.adapters.named_parameters():
            if "down_weight" in name or "up_weight" in name:
                bank.copy_(torch.randn(bank.shape))
    check_refused(lambda: torchgraft.compose(noisy, "c", Stack("english", "ner")), "the bank adapters.layer_0.",
                  "somebody wrote over", "replace_adapter")  # fmt: skip


def test_compositions_where_only_adapters_can_be(base, composed, files: Path, tmp_path: Path) -> None:
    assert AdapterPool(composed, 8).compositions().keys() == {"en_ner"}
    pool = AdapterPool(base, 2)
    check_refused(lambda: pool.insert("en_ner", files / "setup"), COMPOSITION, "have directories of their own in it")
    check_refused(lambda: torchgraft.load_adapter(base, files / "setup"), COMPOSITION)
    check_refused(lambda: torchgraft.graft(base, adapters={"t": files / "setup"}), COMPOSITION)
    x = torch.randn(2, 5, 16)
    check_refused(lambda: torchgraft.export(composed, (x,)), "export: the module has compositions", "remove them")
    out = tmp_path / "out"
    check_command("add", files / "base.pt", "-o", out, "--adapter", f"t={files / 'setup'}", says=(COMPOSITION,))
    torch.save((x,), files / "x.pt")
    words = ("export", files / "composed.pt", "-o", tmp_path / "out.pt2", "--example", files / "x.pt")
    check_command(*words, says=("has compositions", "remove them"))
    check_command("merge", files / "composed.pt", "en_ner", "-o", out, says=("'en_ner' is a composition",))
    assert list(tmp_path.iterdir()) == []
