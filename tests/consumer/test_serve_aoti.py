"""examples/serve_aoti: the numbers of the TorchScript module, from a package and without Python; adapters swapped."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import torchgraft
from hosts_support import attempt, package_without_code, run
from test_serve import check_same

TOKENS, HIDDEN = 5, 16
IDS = torch.tensor([1, 0, -1, 1])

pytestmark = pytest.mark.slow(seconds=90)


def _noisy(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            is_open = tensor.is_floating_point() and tensor.isfinite().all() and not name.endswith("scaling")
            if name.startswith("adapters.") and is_open:
                tensor.add_(0.3 * torch.randn_like(tensor))
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt (adapters "first" and "second"), its package model.aoti.pt2, inputs.json; other.pt, in which "second" is
    another adapter of the same size, wider.pt, in which it is larger, and unpadded.pt, in which the gates of "first"
    are means over unpadded tokens, and shared.pt, in which two layers share a bank; pool.aoti.pt2, which says that it
    is a package of a pool."""
    folder = tmp_path_factory.mktemp("packages")
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(HIDDEN, 2, 32, batch_first=True, dropout=0.0)
    base = torch.jit.script(nn.TransformerEncoder(layer, 2).eval())
    module = torchgraft.graft(torchgraft.graft(base, "unipelt", "first"), "lora", "second")
    _noisy(module).save(folder / "model.pt")
    _noisy(torchgraft.replace_adapter(module, "second", "lora")).save(folder / "other.pt")
    torchgraft.replace_adapter(module, "second", "lora[r=16]").save(folder / "wider.pt")
    unpadded = torchgraft.graft(base, "unipelt", "first", gate_pooling="unpadded")
    torchgraft.graft(unpadded, "lora", "second").save(folder / "unpadded.pt")
    shared = torch.jit.load(folder / "other.pt")
    shared.adapters.layer_1.selfattn_lora_q.lora_a = shared.adapters.layer_0.selfattn_lora_q.lora_a
    shared.save(folder / "shared.pt")
    package_without_code(folder / "pool.aoti.pt2", {"torchgraft": json.dumps({"adapters": [], "pool": {}})})
    inputs = torch.randn(len(IDS), TOKENS, HIDDEN)
    torchgraft.compile_package(torchgraft.export(module, inputs[:2], gates=True), folder / "model.aoti.pt2")
    torch.save(inputs, folder / "inputs.pt")
    document = {"inputs": [inputs.double().tolist()], "dtypes": ["float32"]}
    (folder / "inputs.json").write_text(json.dumps(document))
    return folder


def _in_python(folder: Path, name: str):
    with torch.inference_mode():
        return torch.jit.load(folder / name).forward_with_gates(torch.load(folder / "inputs.pt"), adapter_ids=IDS)


def _served(program: Path, folder: Path, tmp_path: Path, *options: object):
    arguments = [folder / "model.aoti.pt2", folder / "inputs.json", "--adapter-ids", "1,0,-1,1"]
    printed = run(program, *arguments, "--output", tmp_path / "out.json", *options).stdout
    return json.loads((tmp_path / "out.json").read_text()), printed


def test_a_mixed_batch_and_its_gates(serve_aoti: Path, folder: Path, tmp_path: Path) -> None:
    report, printed = _served(serve_aoti, folder, tmp_path, "--repeat", 2)
    assert printed.startswith("adapters  0 first  1 second\n") and "latency" in printed
    check_same(report, _in_python(folder, "model.pt"))


def test_an_adapter_is_swapped_in_place(serve_aoti: Path, folder: Path, tmp_path: Path) -> None:
    options = ["--model", folder / "model.pt", "--banks", folder / "other.pt"]
    report, printed = _served(serve_aoti, folder, tmp_path, *options)
    assert "banks swapped in " in printed
    check_same(report, _in_python(folder, "other.pt"))
    before, after = (_in_python(folder, name)[0] for name in ("model.pt", "other.pt"))
    assert (before - after).abs().max() > 0.01


FAULTS = {
    "larger banks": (["--adapter-ids", "1,0,-1,1", "--model", "model.pt", "--banks", "wider.pt"], "export that file"),
    "other gates": (
        ["--adapter-ids", "1,0,-1,1", "--model", "model.pt", "--banks", "unpadded.pt"],
        "first (gates over all tokens), second (gates over all tokens), and the new file has first (gates over "
        "unpadded tokens)",
    ),
    "other sharing": (
        ["--adapter-ids", "1,0,-1,1", "--model", "model.pt", "--banks", "shared.pt"],
        "adapters.layer_0.selfattn_lora_q.lora_a and adapters.layer_1.selfattn_lora_q.lora_a are one tensor in the new "
        "file, and not in the package: export the new file",
    ),
    "no ids": ([], "the package takes adapter_ids: give one for each row"),
    "no option": (["--adapter-ids", "1,0,-1,1", "--nosuch"], "(serve_aoti --help)"),
    "no number": (["--repeat", "-1"], "--repeat: expected an integer from 0, got -1 (serve_aoti --help)"),
    "no model": (["--adapter-ids", "1,0,-1,1", "--banks", "other.pt"], "--model"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_line(case: str, serve_aoti: Path, folder: Path) -> None:
    options, message = FAULTS[case]
    done = attempt(serve_aoti, "model.aoti.pt2", "inputs.json", *options, cwd=folder)
    status = 2 if "(serve_aoti --help)" in done.stderr else 1
    assert done.returncode == status and done.stderr.startswith("serve_aoti: ") and message in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_an_unknown_adapter_is_named(serve_aoti: Path, folder: Path) -> None:
    done = attempt(serve_aoti, "model.aoti.pt2", "inputs.json", "--adapter-ids", "1,0,2,1", cwd=folder)
    # torch's compiled code writes a line of its own before.
    assert done.stderr.splitlines()[-1] == "serve_aoti: gated_lora: expected adapter_ids in [-1, 2), got 2 in row 2"
    assert done.returncode == 1


NO_PACKAGES = {"model.pt": "expected one of torchgraft export MODEL.pt --aoti", "pool.aoti.pt2": "examples/server"}


@pytest.mark.parametrize("name", NO_PACKAGES)
def test_a_file_that_is_no_package_of_adapters_is_named(name: str, serve_aoti: Path, folder: Path) -> None:
    done = attempt(serve_aoti, folder / name, folder / "inputs.json")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"serve_aoti: {folder / name}: ")
    assert NO_PACKAGES[name] in done.stderr.splitlines()[-1]
