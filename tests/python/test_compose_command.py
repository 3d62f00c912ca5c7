"""`torchgraft compose`: the file that it writes, and what it refuses in one line."""

import json
from pathlib import Path

import pytest
import torch

import torchgraft
from scripts_here import run_here

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    base = torch.jit.script(torch.nn.TransformerEncoder(layer, 2).eval())
    module = torchgraft.graft(base, "seq_bn[reduction_factor=2]", "en", verify=False)
    module = torchgraft.graft(module, "seq_bn[reduction_factor=4]", "ner", verify=False)
    path = tmp_path_factory.mktemp("compose") / "model.pt"
    module.save(str(path))
    return path


def test_a_file_with_a_composition_is_written_and_listed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    done = run_here("graft.py", "compose", model, "-o", out, "--name", "en_ner", "Stack(en, ner)")
    assert done.returncode == 0, done.stderr
    assert "'en_ner' is Stack(en, ner); adapters en, ner, en_ner" in done.stdout
    listed = run_here("graft.py", "list", out)
    assert "Stack(en, ner)" in listed.stdout
    module, here = torch.jit.load(str(out)), torchgraft.compose(torch.jit.load(str(model)), "c", "Stack(en, ner)")
    module.activate("en_ner")
    here.activate("c")
    x = torch.randn(2, 5, 16)
    assert torch.equal(module(x), here(x))


@pytest.mark.parametrize(
    ("text", "message"),
    [("Stack(en, none)", "no adapter is called 'none'"), ("Stack(en", "a comma or a closing bracket")],
)
def test_what_cannot_be_composed_is_one_line(model: Path, tmp_path: Path, text: str, message: str) -> None:
    done = run_here("graft.py", "compose", model, "-o", tmp_path / "out.pt", "--name", "c", text)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_a_composition_cannot_split_are_asked_for(model: Path, tmp_path: Path) -> None:
    """Those that verification makes up have another length."""
    text = "Split(en, ner, splits=[2, 1])"
    command = ["graft.py", "compose", model, "-o", tmp_path / "out.pt", "--name", "c", text]
    done = run_here(*command)
    assert done.returncode == 0
    assert "'c' splits inputs of other sizes than those that were made up; give example inputs" in done.stderr
    torch.save((torch.randn(2, 3, 16),), tmp_path / "example.pt")
    assert run_here(*command, "--example", tmp_path / "example.pt").returncode == 0


def test_a_composition_is_saved_and_loaded_as_a_directory(model: Path, tmp_path: Path) -> None:
    """As adapters are, by the same commands."""
    composed, bare, loaded = (tmp_path / name for name in ("composed.pt", "bare.pt", "loaded.pt"))
    assert run_here("graft.py", "compose", model, "-o", composed, "--name", "both", "Stack(en, ner)").returncode == 0
    done = run_here("graft.py", "save", composed, "both", tmp_path / "both")
    assert done.returncode == 0 and "composition both" in done.stdout, done.stderr
    torchgraft.ungraft(torch.jit.load(str(model)), verify=False).save(str(bare))
    done = run_here("graft.py", "load", bare, tmp_path / "both", "-o", loaded)
    assert done.returncode == 0 and "is 'both' and its adapters" in done.stdout, done.stderr
    x = torch.randn(2, 5, 16)
    modules = [torch.jit.load(str(path)) for path in (composed, loaded)]
    for module in modules:
        module.activate("both")
    assert torch.equal(modules[0](x), modules[1](x))
    for present in (model, composed):  # the latter has the composition, too
        done = run_here("graft.py", "load", present, tmp_path / "both", "-o", tmp_path / "again.pt")
        assert done.returncode == 1 and "of names in" in done.stderr and "--force" in done.stderr
        done = run_here("graft.py", "load", present, tmp_path / "both", "-o", tmp_path / "again.pt", "--force")
        assert done.returncode == 0, done.stderr
        assert torch.jit.load(str(tmp_path / "again.pt")).adapter_names() == ["en", "ner", "both"]
    done = run_here("graft.py", "save", composed, "en", tmp_path / "both")
    assert done.returncode == 1 and "holds a composition (adapter_setup.json)" in done.stderr
    assert run_here("graft.py", "save", composed, "en", tmp_path / "en").returncode == 0
    done = run_here("graft.py", "save", composed, "both", tmp_path / "en")
    assert done.returncode == 1 and "holds an adapter (adapter_config.json)" in done.stderr
    for name, kept, gone in (("both", "adapter_setup.json", "adapter_config.json"),
                             ("en", "adapter_config.json", "adapter_setup.json")):  # fmt: skip
        assert run_here("graft.py", "save", composed, name, tmp_path / "en", "--force").returncode == 0
        assert (tmp_path / "en" / kept).exists() and not (tmp_path / "en" / gone).exists()
    done = run_here("graft.py", "load", bare, tmp_path / "both", "-o", tmp_path / "new.pt", "--trainable")
    assert done.returncode == 1 and "a composition is loaded frozen" in done.stderr


def test_list_counts_the_layers_of_a_fuse(model: Path, tmp_path: Path) -> None:
    module = torchgraft.add_adapter_fusion(torch.jit.load(str(model)), ["en", "ner"], "dynamic")
    torchgraft.compose(module, "both", torchgraft.Fuse("en", "ner")).save(str(tmp_path / "both.pt"))
    count = 2 * (3 * 16 * 16 + 2 * 16)  # two layers: query, key and value, and the biases of the first two
    listed = run_here("graft.py", "list", tmp_path / "both.pt", "--json")
    entry = json.loads(listed.stdout)[-1]
    assert (entry["name"], entry["parameters"], entry["bytes"]) == ("both", count, 4 * count)
    assert entry["by_location"] == {"output_adapter": count} and entry["composition"] == "Fuse(en, ner)"
    assert f"{count:,}" in run_here("graft.py", "list", tmp_path / "both.pt").stdout
