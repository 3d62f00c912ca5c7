"""benchmarks/models.py runs, and what it writes has the form that is said. No times are asserted."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

_SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "models.py"
_SMALL = dict(num_hidden_layers=1, hidden_size=24, num_attention_heads=2, intermediate_size=48)
pytestmark = pytest.mark.filterwarnings("ignore")  # those of tracing
_OURS = {"torchgraft", "torchgraft, optimised", "base, optimised"}
_ALWAYS = {"base, eager", "base", "library, eager", "library, traced", *_OURS}


@pytest.fixture(scope="module")
def models() -> ModuleType:
    specification = importlib.util.spec_from_file_location("models_benchmark", _SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where its dataclass looks its annotations up
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow(seconds=90)
def test_rows_of_a_small_run(tmp_path: Path) -> None:
    options = ["--models", "MiniLM", "--shapes", "1x8", "2x9", "--threads", "1", "--rounds", "3", "--markdown"]
    files = ["--json", str(tmp_path / "rows.json"), "--picture", str(tmp_path / "bars.svg")]
    done = subprocess.run([sys.executable, str(_SCRIPT), *options, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["machine"]["kernels"] in ("auto", "fused", "reference") and written["passes"] == "forward"
    found = {(row["config"], row["shape"]): set() for row in written["rows"]}
    assert set(found) == {(config, shape) for config in ("UniPELT", "MAM", "LoRA") for shape in ("1x8", "2x9")}
    for row in written["rows"]:
        found[row["config"], row["shape"]].add(row["variant"])
        assert (row["model"], row["threads"]) == ("MiniLM", 1)
        assert row["milliseconds"] > 0 and row["quartiles"][0] <= row["quartiles"][1]
        assert row["variant"] != "base" or row["ratio"] == 1.0
    for (config, _), variants in found.items():
        peers = {"peft, eager", "peft, traced"} if config == "LoRA" else {"library, ejected"}
        assert variants == _ALWAYS | peers
    assert (tmp_path / "bars.svg").read_text().startswith("<?xml")
    cells = [[part.strip() for part in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    assert cells[0] == ["variant", "1x8", "2x9", "largest error"]
    assert len(cells) == 3 * 2 + len(written["rows"]) // 2


@pytest.mark.slow(seconds=90)
def test_rows_are_added_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"

    def run(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(_SCRIPT), "--models", "MiniLM", "--configs", "UniPELT", "--rounds", "2"]
        command += ["--threads", "1", "--add", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for shapes in (["1x8", "1x9"], ["1x9", "1x10"]):
        done = run("--json", str(path), "--shapes", *shapes)
        assert done.returncode == 0, done.stderr
    rows = [(row["shape"], row["variant"]) for row in json.loads(path.read_text())["rows"]]
    assert len(rows) == len(set(rows)) and {shape for shape, _ in rows} == {"1x8", "1x9", "1x10"}
    other = run("--json", str(path), "--shapes", "1x8", "--dtype", "bfloat16")
    assert other.returncode == 1 and "--add: " in other.stderr and "of another machine, dtype" in other.stderr
    nowhere = run("--shapes", "1x8")
    assert nowhere.returncode == 2 and "--add: expected --json" in nowhere.stderr


@pytest.mark.slow(seconds=10)
def test_shapes_that_a_vision_model_has_not() -> None:
    command = [sys.executable, str(_SCRIPT), "--models", "ViT-base", "--shapes", "8x128"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--shapes: ViT-base has 197 tokens (8x197)" in done.stderr


@pytest.mark.parametrize("config", ["UniPELT", "MAM", "LoRA"])
@pytest.mark.parametrize("sizes", [_SMALL, _SMALL | dict(image_size=32)], ids=["text", "vision"])
def test_variants_compute_the_same_kind_of_thing(models: ModuleType, sizes: dict, config: str) -> None:
    batch = models.batch_of("2x5", sizes)
    variants = models.variants_of(sizes, config, models.parsed([]))
    outputs = {name: run(*batch) for name, run in variants.items()}
    assert {tuple(output.shape) for output in outputs.values()} == {
        (2, 5, 24)
    }  # vision: two by two patches and one more
    # A fresh LoRA changes nothing; the others are drawn anew for each variant.
    if config == "LoRA":
        for name, output in outputs.items():
            torch.testing.assert_close(output, outputs["base"], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("sizes", [_SMALL, _SMALL | dict(image_size=32)], ids=["text", "vision"])
def test_all_of_a_variant_is_in_bfloat16(models: ModuleType, sizes: dict) -> None:
    batch = models.batch_of("2x5", sizes, torch.bfloat16)
    not_frozen = models.parsed(["--dtype", "bfloat16", "--backward"])
    for name, run in models.variants_of(sizes, "UniPELT", not_frozen).items():
        assert run(*batch).dtype == torch.bfloat16, name
        assert {parameter.dtype for parameter in run.parameters()} == {torch.bfloat16}, name


def test_every_variant_has_a_colour_of_its_own(models: ModuleType) -> None:
    from picture import COLORS

    variants = {*models.variants_of(_SMALL, "LoRA", models.parsed(["--compile"])), "library, ejected"}
    documented = re.findall(r"^    (\S+(?: \S+)*)", models.engines.__doc__, re.MULTILINE)
    assert {*variants, *documented} - {models.BASE} == set(COLORS)
    assert len(set(COLORS.values())) == len(COLORS)


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("sizes", [_SMALL, _SMALL | dict(image_size=32)], ids=["text", "vision"])
def test_engines_compute_the_same(models: ModuleType, sizes: dict) -> None:
    if missing := models.engines.missing_packages():
        pytest.skip(f"{missing} of requirements/engines.txt are not installed")
    variants = models.variants_of(sizes, "UniPELT", models.parsed(["--engines"]))
    for shape in ("2x5", "1x9"):
        errors = models.largest_errors(variants, models.batch_of(shape, sizes))
        assert {"int8", "ONNX Runtime", "torchgraft, ONNX Runtime", "OpenVINO", "torchgraft, OpenVINO"} <= set(errors)
        for name, error in errors.items():
            assert error < (0.3 if "int8" in name or "bfloat16" in name else 1e-5), (name, error)


def test_an_error_is_that_of_the_variants_own_model(models: ModuleType) -> None:
    one, two = torch.ones(2), torch.full([2], 2.0)
    outputs = {"base": one, "int8": one + 0.25, "library, eager": two, "torchgraft": two, "torchgraft, int8": two - 0.5}
    variants = {name: lambda x, output=output: output for name, output in outputs.items()}
    errors = models.largest_errors(variants, (one,))
    assert errors == {"base": 0.0, "int8": 0.25, "torchgraft": 0.0, "torchgraft, int8": 0.5}


@pytest.mark.parametrize("other", [["--backward"], ["--dtype", "bfloat16"]])
def test_engines_run_forward_passes_in_float32(models: ModuleType, capsys, other: list[str]) -> None:
    with pytest.raises(SystemExit):
        models.parsed(["--engines", *other])
    assert "--engines: expected float32 and forward passes" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["UniPELT", "LoRA"])
def test_what_a_backward_pass_trains(models: ModuleType, config: str) -> None:
    variants = models.variants_of(_SMALL, config, models.parsed(["--backward"]))
    batch = models.batch_of("2x5")
    for name, run in variants.items():
        assert models.passed(run, batch, backward=True) > 0
        trained = {path for path, parameter in run.named_parameters() if parameter.grad is not None}
        if name.startswith("base"):
            assert any("query.weight" in path for path in trained), name
        else:
            markers = ("adapter", "lora", "prefix")
            assert trained and all(any(marker in path for marker in markers) for path in trained), name
