"""examples/serve: the same numbers as Python, from a process without Python."""

import json

import pytest
import torch
from torch import nn

import torchgraft
from hosts_support import attempt, run

BATCH, TOKENS, HIDDEN = 3, 5, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base.pt, grafted.pt (adapters "first": UniPELT, "second": LoRA) and inputs.json."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(HIDDEN, 2, 32, batch_first=True, dropout=0.0)
    base = torch.jit.script(nn.TransformerEncoder(layer, 2).eval())
    grafted = torchgraft.graft(base, config="unipelt", name="first")
    grafted = torchgraft.graft(grafted, config="lora", name="second")
    with torch.no_grad():  # fresh adapters would add nothing
        for parameter in grafted.adapters.parameters():
            if parameter.isfinite().all() and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    base.save(folder / "base.pt")
    grafted.save(folder / "grafted.pt")
    inputs = torch.randn(BATCH, TOKENS, HIDDEN)
    document = {"inputs": [inputs.double().tolist()], "dtypes": ["float32"]}
    (folder / "inputs.json").write_text(json.dumps(document))
    torch.save(inputs, folder / "inputs.pt")
    return folder


def served(serve, folder, tmp_path, *options, model="grafted.pt"):
    """serve's report as data, and what it printed."""
    printed = run(serve, folder / model, folder / "inputs.json", "--output", tmp_path / "out.json", *options).stdout
    return json.loads((tmp_path / "out.json").read_text()), printed


def in_python(folder, ids=None, activate=None):
    model = torch.jit.load(folder / "grafted.pt")
    if activate:
        model.activate(activate)
    with torch.inference_mode():
        return model.forward_with_gates(torch.load(folder / "inputs.pt"), adapter_ids=ids)


def check_same(report, expected):
    result, gates = expected
    assert report["output"]["shape"] == list(result.shape)
    torch.testing.assert_close(torch.tensor(report["output"]["values"]), result)
    assert sorted(report["gates"]) == sorted(gates)
    for adapter, layers in gates.items():
        got = report["gates"][adapter]["layers"]
        assert sorted(map(int, got)) == sorted(layers)
        for layer, locations in layers.items():
            assert sorted(got[str(layer)]) == sorted(locations)
            for location, values in locations.items():
                torch.testing.assert_close(torch.tensor(got[str(layer)][location]), values)


def test_active_adapter(serve, folder, tmp_path):
    report, printed = served(serve, folder, tmp_path)
    check_same(report, in_python(folder))
    assert "second (active)" in printed and "float32 [3, 5, 16]" in printed
    assert "latency" not in printed


def test_named_adapter(serve, folder, tmp_path):
    report, printed = served(serve, folder, tmp_path, "--adapter", "first", "--threads", 1, "--repeat", 3)
    check_same(report, in_python(folder, activate="first"))
    assert len(report["milliseconds"]) == 3
    assert "gates of first" in printed and "self_prefix" in printed and "row 2" in printed
    assert "ms (median of 3)" in printed


def test_one_adapter_per_row(serve, folder, tmp_path):
    report, printed = served(serve, folder, tmp_path, "--adapter-ids", "1,-1,0")
    check_same(report, in_python(folder, ids=torch.tensor([1, -1, 0])))
    assert report["gates"]["second"]["rows"] == [0]
    assert report["gates"]["first"]["rows"] == [2]


def test_base_model_has_no_gates(serve, folder, tmp_path):
    report, printed = served(serve, folder, tmp_path, model="base.pt")
    assert report["gates"] == {} and "adapters  none" in printed
    expected = torch.jit.load(folder / "base.pt")(torch.load(folder / "inputs.pt"))
    torch.testing.assert_close(torch.tensor(report["output"]["values"]), expected)


def test_an_int8_model_with_every_engine(serve, folder, tmp_path, monkeypatch):
    torchgraft.quantize(torch.jit.load(folder / "grafted.pt")).save(folder / "int8.pt")
    inputs = torch.load(folder / "inputs.pt")
    # Sets torch.backends.quantized.engine back to what it is.
    monkeypatch.setattr(torch.backends.quantized, "engine", torch.backends.quantized.engine)
    for engine in torch.backends.quantized.supported_engines:
        report, _ = served(serve, folder, tmp_path, "--quantized-engine", engine, model="int8.pt")
        torch.backends.quantized.engine = engine
        with torch.inference_mode():
            expected = torch.jit.load(folder / "int8.pt")(inputs)
        torch.testing.assert_close(torch.tensor(report["output"]["values"]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "inputs", "options", "message"),
    [
        ("missing.pt", None, [], "missing.pt: no such file"),
        ("inputs.json", None, [], "inputs.json: not a TorchScript file"),
        ("grafted.pt", None, ["--adapter", "third"], "third"),
        ("grafted.pt", None, ["--adapter-ids", "0,5,0"], "adapter_ids"),
        ("grafted.pt", None, ["--adapter-ids", "0,1,x"], "--adapter-ids: expected an integer from -1, got x ("),
        ("grafted.pt", None, ["--threads", "0"], "--threads: expected an integer from 1, got 0 (serve --help)"),
        ("grafted.pt", None, ["--adapter", "first", "--adapter-ids", "0"], "excludes"),
        ("grafted.pt", None, ["--nosuch"], "(serve --help)"),
        ("grafted.pt", None, ["--quantized-engine", "mkl"], "--quantized-engine: mkl not in {"),
        ("base.pt", None, ["--adapter", "first"], "has no adapters"),
        ("base.pt", None, ["--adapter-ids", "0,0,0"], "has no adapters"),
        ("grafted.pt", "{", [], "inputs.json: not JSON ("),
        ("grafted.pt", '{"inputs": [1e400]}', [], "inputs.json: not JSON ("),
        ("grafted.pt", "[" * 1_000_000, [], "inputs.json: nested too deeply"),
        ("grafted.pt", "[]", [], 'expected {"inputs"'),
        ("grafted.pt", '{"inputs": [[1, 2]], "dtypes": []}', [], "as many dtypes as inputs, 1, got []"),
        ("grafted.pt", '{"inputs": [[1, 2]], "dtypes": ["int8"]}', [], 'int64, got "int8"'),
        ("grafted.pt", '{"inputs": [[[1, 2], [3]]]}', [], "inputs[0][1]: expected a list of 2"),
        ("grafted.pt", '{"inputs": [[1, 2.5]]}', [], "inputs[0][1]: expected an integer, got 2.5"),
        ("grafted.pt", '{"inputs": [[1, true]]}', [], "inputs[0][1]: expected an integer, got true"),
        (
            "grafted.pt",
            '{"inputs": [[1, true]], "dtypes": ["float32"]}',
            [],
            "inputs[0][1]: expected a number, got true",
        ),
        ("grafted.pt", '{"inputs": [[1, [2]]]}', [], "inputs[0][1]: expected an integer, got [2]"),
        ("grafted.pt", '{"inputs": []}', [], "missing value for argument"),
    ],
)
def test_errors_are_one_line(serve, folder, tmp_path, model, inputs, options, message):
    path = folder / "inputs.json"
    if inputs is not None:
        path = tmp_path / "inputs.json"
        path.write_text(inputs)
    result = attempt(serve, folder / model, path, *options)
    assert result.returncode == (2 if "(serve --help)" in result.stderr else 1)
    assert message in result.stderr
    assert result.stderr.startswith("serve: ") and result.stderr.count("\n") == 1
