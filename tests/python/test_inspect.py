"""inspect() and `sites`: a user can save, edit and give back what the patcher detects."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import torchgraft
from grafted import base, grafted
from models import VARIANTS, make_batch
from odd_layers import Plain
from test_cli import check_one_line, run, run_alone

ROOT = Path(__file__).resolve().parents[2]
FLOAT = torch.float32
BERT = "bert_sdpa"
MODELS = ["bert_sdpa", "own_pre_unmasked_packed_sdpa", "encoder_script_post"]
FIELDS = {"index", "layer", "shares", "stack", "kind", "num_heads", "num_kv_heads", "head_dim", "hidden_size",
          "norm_order", "ffn_norm_order", "attention_mask", "relative_scores", "query", "key", "value", "output",
          "ffn_in", "ffn_gate", "ffn_out", "attention_residual", "ffn_residual", "cache", "locations",
          "notes"}  # fmt: skip


@pytest.fixture
def seen() -> dict:
    """What is seen in BERT, to edit."""
    return torchgraft.inspect(base(BERT, FLOAT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    base(BERT, FLOAT).save(str(folder / "base.pt"))
    torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2))).save(str(folder / "plain.pt"))
    (folder / "sites.json").write_text(run("inspect", folder / "base.pt", "--json").stdout)
    (folder / "text.json").write_text("layers")
    return folder


def grafted_layers(module: torch.jit.ScriptModule) -> dict[str, set[str]]:
    """{"layer_0": {"self_prefix", ...}}"""
    result: dict[str, set[str]] = {}
    for key in module.state_dict():
        if key.startswith("adapters.layer_"):
            _, layer, slot, _ = key.split(".")
            result.setdefault(layer, set()).add(slot)
    return result


def result_of(module: torch.jit.ScriptModule) -> torch.Tensor:
    with torch.no_grad():
        return module(*VARIANTS[BERT].arguments(make_batch([5, 3], 5, FLOAT)))[0]


@pytest.mark.parametrize("name", MODELS)
def test_every_field_is_there(name: str) -> None:
    structure = torchgraft.inspect(base(name, FLOAT))
    assert set(structure) == {"layers", "linear_maps", "near_misses", "embeddings"}
    assert structure["embeddings"] == {"size": 48, "output": False, "note": ""}
    assert [set(layer) for layer in structure["layers"]] == [FIELDS] * 3
    assert [(layer["index"], layer["layer"]) for layer in structure["layers"]] == [(0, 0), (1, 1), (2, 2)]


# What is given back


def _with_numbers(value: object, change) -> list:
    """Copies of `value`, in each of which one number, or one of true and false, is another thing."""
    if isinstance(value, bool | int):
        return [(value, other) for other in change(value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    result = []
    for key, inner in items:
        for found, changed in _with_numbers(inner, change):
            other = value.copy()
            other[key] = changed
            result.append((found, other))
    return result


def test_true_is_no_number_in_sites_and_one_is_not_true(seen: dict) -> None:
    seen["layers"] = seen["layers"][:1]
    changed = _with_numbers(
        seen["layers"], lambda value: [int(value)] if isinstance(value, bool) else [True, value + 0.5]
    )
    assert len(changed) > 20 and any(isinstance(value, bool) for value, _ in changed)
    for _, layers in changed:
        with pytest.raises(torchgraft.GraftError, match="sites: .* cannot be (true|[0-9.]+)"):
            torchgraft.inspect(base(BERT, FLOAT), sites=seen | {"layers": layers})


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_unedited_sites_change_nothing(name: str, tmp_path: Path) -> None:
    module = base(name, FLOAT)
    seen = torchgraft.inspect(module)
    (tmp_path / "sites.json").write_text(json.dumps(seen))
    for sites in (seen, tmp_path / "sites.json", str(tmp_path / "sites.json")):
        assert torchgraft.inspect(module, sites=sites) == seen
    graft = lambda **sites: torchgraft.graft(module, config="unipelt", name="task", **sites)  # noqa: E731
    assert grafted_layers(graft(sites=seen)) == grafted_layers(graft())


def test_the_dict_that_is_given_stays_as_it_is(seen: dict) -> None:
    before = copy.deepcopy(seen)
    torchgraft.inspect(base(BERT, FLOAT), sites=seen)
    assert seen == before


def test_a_removed_entry_gets_no_adapters(seen: dict) -> None:
    del seen["layers"][1]
    model = torchgraft.graft(base(BERT, FLOAT), config="unipelt", name="task", sites=seen)
    assert set(grafted_layers(model)) == {"layer_0", "layer_2"}
    assert [layer["index"] for layer in torchgraft.inspect(base(BERT, FLOAT), sites=seen)["layers"]] == [0, 2]


def test_a_removed_entry_computes_what_leave_out_does(seen: dict) -> None:
    """LoRA with random weights in both matrices, so that a site that is missed or added is seen in the result."""
    seen["layers"] = seen["layers"][:1]
    results = []
    for sites, leave_out in ((seen, []), (None, [1, 2])):
        torch.manual_seed(0)
        config = torchgraft.LoRAConfig(init_weights="bert", intermediate_lora=True, leave_out=leave_out)
        results.append(result_of(torchgraft.graft(base(BERT, FLOAT), config=config, name="task", sites=sites)))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], result_of(base(BERT, FLOAT)))


@pytest.mark.parametrize(
    ("residual", "location", "config", "allowed"),
    [
        ("attention_residual", "mh_adapter", "double_seq_bn", "seq_bn"),
        ("ffn_residual", "output_adapter", "par_bn", "lora"),
    ],
)
def test_without_a_residual_there_is_no_bottleneck(
    seen: dict, residual: str, location: str, config: str, allowed: str
) -> None:
    module = base(BERT, FLOAT)
    seen["layers"][1][residual] = False
    locations = [layer["locations"] for layer in torchgraft.inspect(module, sites=seen)["layers"]]
    assert [location in names for names in locations] == [True, False, True]
    with pytest.raises(torchgraft.GraftError, match=f"no {location} in layers 1;.*leave_out"):
        torchgraft.graft(module, config=config, name="task", sites=seen)
    torchgraft.graft(module, config=allowed, name="task", sites=seen)


def test_a_projection_that_is_none_gets_no_lora(seen: dict) -> None:
    for layer in seen["layers"]:
        layer["ffn_in"] = None
    config = torchgraft.LoRAConfig(intermediate_lora=True, output_lora=True)
    with pytest.raises(torchgraft.GraftError, match="no intermediate_lora in layers 0, 1, 2"):
        torchgraft.graft(base(BERT, FLOAT), config=config, name="task", sites=seen)
    config = config.replace(intermediate_lora=False)
    model = torchgraft.graft(base(BERT, FLOAT), config=config, name="task", sites=seen)
    assert grafted_layers(model)["layer_0"] == {"selfattn_lora_q", "selfattn_lora_v", "output_lora"}


def test_another_kind_has_other_prefixes(seen: dict) -> None:
    seen["layers"][0]["kind"] = "encoder"
    model = torchgraft.graft(base(BERT, FLOAT), config="prefix_tuning", name="task", sites=seen)
    assert grafted_layers(model)["layer_0"] == {"encoder_prefix"}
    assert grafted_layers(model)["layer_1"] == {"self_prefix"}


def test_another_layer_number_is_used_everywhere(seen: dict) -> None:
    for layer in seen["layers"]:
        layer["layer"] += 5
    config = torchgraft.SeqBnConfig(use_gating=True, leave_out=[6])
    model = torchgraft.graft(base(BERT, FLOAT), config=config, name="task", sites=seen)
    assert set(grafted_layers(model)) == {"layer_5", "layer_7"}
    with torch.no_grad():
        _, gates = model.forward_with_gates(*VARIANTS[BERT].arguments(make_batch([4], 4, FLOAT)))
    assert set(gates["task"]) == {5, 7}


def test_another_path_is_the_module_that_is_meant(seen: dict) -> None:
    """Query and key exchanged: then LoRA on q alone changes the key projection."""
    results = []
    for matrix, exchange in (("k", False), ("q", True)):
        sites = copy.deepcopy(seen)
        for layer in sites["layers"]:
            if exchange:
                layer["query"], layer["key"] = layer["key"], layer["query"]
        torch.manual_seed(0)
        config = torchgraft.LoRAConfig(init_weights="bert", attn_matrices=[matrix])
        results.append(result_of(torchgraft.graft(base(BERT, FLOAT), config=config, name="task", sites=sites)))
    assert torch.equal(results[0], results[1])


# What is done to "layers", what the error says.
UNFIT = {
    "unknown kind": (lambda layers: layers[0].update(kind="both"), 'self, encoder, cross, got "both"'),
    "no layer number": (lambda layers: layers[2].pop("layer"), 'the field "layer" is missing'),
    "an attention that is not there": (lambda layers: layers[1].update(index=7), "7"),
    "one attention twice": (lambda layers: layers[1].update(index=0), "0"),
    "unknown path": (lambda layers: layers[1]["query"].update(path="no.such.module"), "no.such.module"),
    "no layers": (lambda layers: layers.clear(), "no attention"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_sites_that_do_not_fit_are_refused(seen: dict, case: str) -> None:
    edit, message = UNFIT[case]
    edit(seen["layers"])
    with pytest.raises(torchgraft.GraftError, match=re.escape(message)):
        torchgraft.graft(base(BERT, FLOAT), config="unipelt", name="task", sites=seen)


def test_sites_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="expected sites to be a dict or a path, got list"):
        torchgraft.inspect(base(BERT, FLOAT), sites=[])


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    blocks = re.findall(r"<!-- test -->\n```python\n(.*?)```", (ROOT / "docs" / "sites.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    program = tmp_path / "blocks.py"  # a file: torch.jit.script reads the source of what it scripts
    program.write_text("\n".join(blocks))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python") + os.pathsep + os.environ.get("PYTHONPATH", "")}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_misspelt_field_is_named() -> None:
    seen = torchgraft.inspect(base(BERT, FLOAT))
    misspelt = "querry"  # codespell:ignore querry
    seen["layers"][1][misspelt] = None
    with pytest.raises(torchgraft.GraftError, match=f'entry 1 of "layers": there is no field "{misspelt}"'):
        torchgraft.inspect(base(BERT, FLOAT), sites=seen)


# On the command line


def test_what_inspect_writes_can_be_given_back(folder: Path, tmp_path: Path) -> None:
    sites = folder / "sites.json"
    again = run("inspect", folder / "base.pt", "--sites", sites, "--json")
    assert again.returncode == 0, again.stderr
    assert again.stdout == sites.read_text()
    content = json.loads(sites.read_text())
    del content["layers"][0]
    (tmp_path / "edited.json").write_text(json.dumps(content, indent=2))
    done = run("add", folder / "base.pt", "-o", tmp_path / "out.pt", "--config", "lora", "--name", "task",
               "--sites", tmp_path / "edited.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "in 2 layers: " in done.stdout
    table = run("inspect", folder / "base.pt", "--sites", tmp_path / "edited.json").stdout
    assert "layer.{1-2}.attention" in table and "layer.{0-2}.attention" not in table


class _Again(torch.nn.Module):
    """One layer that runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Plain()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.layer(x, mask)
        return x


def test_without_its_first_run_a_layer_shares_with_the_next() -> None:
    module = torch.jit.script(_Again().eval())
    sites = torchgraft.inspect(module)
    assert [layer["shares"] for layer in sites["layers"]] == [None, 0, 0]
    del sites["layers"][0]
    assert [layer["shares"] for layer in torchgraft.inspect(module, sites=sites)["layers"]] == [None, 1]
    grafted = torchgraft.graft(module, config="lora", name="task", sites=sites)
    assert {key.split(".")[1] for key in grafted.state_dict() if key.startswith("adapters.")} == {"layer_0"}


def test_help_says_how_to_edit() -> None:
    text = run("inspect", "--help").stdout
    assert "inspect BASE.pt --json > sites.json" in text and "--sites sites.json" in text


def picture(path: Path) -> str:
    """The texts in it."""
    elements = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return " | ".join(element.text or "" for element in elements)


def test_pictures(folder: Path, tmp_path: Path) -> None:
    """Of a bare model, with a configuration, of a grafted model, and of that with another configuration."""
    grafted(BERT, FLOAT, "unipelt").save(str(tmp_path / "grafted.pt"))
    expected = {
        ("base.pt",): (["base.pt: where adapters can act", "mh_adapter", "location for prefix"], ["gated"]),
        ("base.pt", "mam"): (["base.pt with mam", "prefix of 30", "bottleneck of 24"], ["place", "LoRA"]),
        ("grafted.pt",): (["grafted.pt: adapters 0 task (active: task)", "LoRA, r = 8, gated"], ["place"]),
        ("grafted.pt", "par_bn"): (["LoRA, r = 8, gated", "sequential", "parallel, relu", "with par_bn"], ["place"]),
    }
    for (name, *config), (present, absent) in expected.items():
        model, svg = (folder if name == "base.pt" else tmp_path) / name, tmp_path / "picture.svg"
        done = run("inspect", model, "--svg", svg, *(["--config", *config] if config else []))
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{svg}: written\n"
        drawn = picture(svg)
        assert all(text in drawn for text in present), drawn
        assert not any(text in drawn for text in absent), drawn
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grafted.pt", "picture.svg"]


def test_a_picture_and_data(folder: Path, tmp_path: Path) -> None:
    done = run("inspect", folder / "base.pt", "--svg", tmp_path / "picture.svg", "--json")
    assert json.loads(done.stdout) == json.loads((folder / "sites.json").read_text())
    assert "layers 0 to 2" in picture(tmp_path / "picture.svg")


_SITES = ["inspect", "{folder}/base.pt", "--sites"]
_SVG = ["inspect", "{folder}/base.pt", "--svg", "{tmp}/picture.svg"]
FAILING = {
    "no sites file": ([*_SITES, "{tmp}/none.json"], 1, "none.json: cannot read the sites (No such file"),
    "sites are a directory": ([*_SITES, "{tmp}"], 1, "expected a regular file, got a directory"),
    "sites are not JSON": ([*_SITES, "{folder}/text.json"], 1, "text.json: not JSON"),
    "sites are a model": ([*_SITES, "{folder}/base.pt"], 1, "base.pt: not JSON"),
    "unknown config": ([*_SVG, "--config", "unipel"], 1, "no configuration is called 'unipel'"),
    "all in data": (["inspect", "{folder}/base.pt", "--json", "--all"], 2, "--all is for the table"),
    "picture of nothing": (["inspect", "{folder}/plain.pt", *_SVG[2:]], 1, "no attention was found"),
    "no such directory": ([*_SVG[:3], "{tmp}/none/picture.svg"], 1, "does not exist"),
    "picture over the model": ([*_SVG[:3], "{folder}/base.pt"], 2, "--svg: expected a file ending in .svg"),
}


@pytest.mark.parametrize("case", FAILING)
def test_bad_input_is_one_line_and_leaves_nothing(case: str, folder: Path, tmp_path: Path) -> None:
    arguments, status, message = FAILING[case]
    check_one_line(run(*[argument.format(folder=folder, tmp=tmp_path) for argument in arguments]), status, message)
    assert list(tmp_path.iterdir()) == []


def test_without_dot_the_old_picture_stays(folder: Path, tmp_path: Path) -> None:
    svg = tmp_path / "picture.svg"
    svg.write_text("precious")
    done = run_alone("inspect", folder / "base.pt", "--svg", svg, env={"PATH": str(tmp_path)})
    check_one_line(done, 1, "needs Graphviz's program 'dot'")
    assert svg.read_text() == "precious" and list(tmp_path.iterdir()) == [svg]


def test_dump_holds_the_graph_after_every_pass(folder: Path, tmp_path: Path) -> None:
    done = run("inspect", folder / "base.pt", "--dump", tmp_path)
    assert done.returncode == 0, done.stderr
    passes = sorted((tmp_path / "00_canonicalise_forward").iterdir())
    assert passes[0].name == "00_method.txt" and passes[-1].name.endswith("_simplify.txt")
    before, after = (
        next(file for file in passes if file.name.endswith(f"_{name}.txt")).read_text()
        for name in ("method", "inline_calls")
    )
    assert "prim::CallMethod" in before and "prim::CallMethod" not in after


def test_dump_into_a_file_is_refused(folder: Path) -> None:
    done = run("inspect", folder / "base.pt", "--dump", folder / "base.pt")
    check_one_line(done, 1, "TORCHGRAFT_DUMP: cannot write")
    assert "(Not a directory); name another folder" in done.stderr
