"""The picture of `inspect --svg`: which layers are drawn as one, and that nothing grafted is missing from it."""

import copy
import re
from xml.etree import ElementTree

import pytest
import torch

import torchgraft
from grafted import base
from torchgraft._drawing import draw, make_graph
from torchgraft._layers import Group, Slot, blocks_of, patterns_of, slots_of

HEADS, HEAD_SIZE, HIDDEN = 4, 12, 48
SVG = "{http://www.w3.org/2000/svg}"
CONFIGS = ["unipelt", "mam", "lora", "double_seq_bn", "seq_bn", "par_bn", "prefix_tuning",
           torchgraft.LoRAConfig(attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True),
           torchgraft.BnConfig(True, True, 4, "leakyrelu", is_parallel=True)]  # fmt: skip


def projection(path: str, **changes: object) -> dict:
    return {"path": path, "in_features": HIDDEN, "out_features": HIDDEN, "offset": 0, "packed": False} | changes


def entry(layer: int, path: str = "encoder.layer.{}.", kind: str = "self", ffn: bool = True, **changes: object) -> dict:
    """One attention of inspect()'s "layers", pre-norm, with `layer` in its modules' paths."""
    root = path.format(layer)
    prefix = {"self": "self_prefix", "encoder": "encoder_prefix", "cross": "cross_prefix"}[kind]
    locations = [prefix, "selfattn_lora", "cross_adapter" if kind == "cross" else "mh_adapter"]
    norm = "pre" if ffn else "none"
    result = dict(index=layer, layer=layer, shares=None, kind=kind, num_heads=HEADS, num_kv_heads=HEADS,
                  head_dim=HEAD_SIZE, hidden_size=HIDDEN, norm_order="pre", ffn_norm_order=norm, attention_mask=True,
                  attention_residual=True, ffn_residual=ffn, ffn_in=None, ffn_gate=None, ffn_out=None,
                  cache="none", notes=[])  # fmt: skip
    for role in ("query", "key", "value", "output"):
        result[role] = projection(f"{root}{kind}.{role}")
    if ffn:
        result |= {role: projection(f"{root}{role}") for role in ("ffn_in", "ffn_out")}
        locations += ["intermediate_lora", "output_lora", "output_adapter"]
    return result | {"locations": locations} | changes


def structure(layers: list[dict], near_misses: tuple[str, ...] = ()) -> dict:
    numbered = [layer | {"index": index} for index, layer in enumerate(layers)]
    return {"layers": numbered, "near_misses": list(near_misses)}


def encoder_decoder(depth: int) -> dict:
    """Decoder layers count on from the encoder's; the feed-forward block comes after cross attention."""
    layers = [entry(layer, "enc.{}.", "encoder") for layer in range(depth)]
    for layer in range(depth, 2 * depth):
        layers.append(entry(layer, "dec.{}.", "self", ffn=False))
        layers.append(entry(layer, "dec.{}.", "cross", ffn_gate=projection(f"dec.{layer}.ffn_gate")))
    return structure(layers)


def groups(layers: list[dict], slots: dict[int, frozenset[Slot]] | None = None) -> list[list[Group]]:
    return patterns_of(blocks_of(structure(layers)["layers"], slots or {}))


def labels(patterns: list[list[Group]]) -> list[list[str]]:
    return [[group.label for group in pattern] for pattern in patterns]


def texts(svg: bytes) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def plain(source: str) -> str:
    return re.sub(r"<[^<>]*>", " ", source)


def test_alike_layers_are_one_group() -> None:
    patterns = groups([entry(layer) for layer in range(48)])
    assert labels(patterns) == [["layers 0 to 47"]]
    assert patterns[0][0].path(0, "query") == "encoder.layer.{0-47}.self.query"


def test_layers_that_differ_are_not() -> None:
    layers = [entry(layer) for layer in range(48)]
    layers[0] = entry(0, num_kv_heads=2)
    layers[47] = entry(47, output=None)
    assert labels(groups(layers)) == [["layer 0"], ["layers 1 to 46"], ["layer 47"]]


def test_what_is_grafted_makes_a_difference() -> None:
    slots = {layer: frozenset({Slot("self_prefix", 10, True)}) for layer in range(1, 6)}
    assert labels(groups([entry(layer) for layer in range(6)], slots)) == [["layer 0"], ["layers 1 to 5"]]


def test_layers_in_turn_are_a_pattern() -> None:
    layers = [entry(layer, num_heads=8 if layer % 3 == 2 else 4) for layer in range(24)]
    assert labels(groups(layers)) == [["layers 0, 3, ... 21", "layers 1, 4, ... 22", "layers 2, 5, ... 23"]]


def test_one_layer_that_runs_many_times() -> None:
    layers = [entry(0, shares=None if run == 0 else 0) for run in range(12)]
    assert labels(groups(layers)) == [["layer 0, run 12 times"]]


def test_the_attentions_of_a_decoder_layer_are_one_block() -> None:
    blocks = blocks_of(encoder_decoder(3)["layers"], {})
    assert [[attention["kind"] for attention in block.attentions] for block in blocks] == (
        [["encoder"]] * 3 + [["self", "cross"]] * 3
    )


def test_a_shared_decoder_layer_is_split_at_every_run() -> None:
    run = [entry(0, ffn=False), entry(0, kind="cross")]
    layers = run + [entry(0, ffn=False, shares=0), entry(0, kind="cross", shares=1)] * 2
    assert labels(groups(layers)) == [["layer 0, run 3 times"]]
    assert len(blocks_of(structure(layers)["layers"], {})) == 3


@pytest.mark.parametrize("layers", [[], [entry(3)]])
def test_few_layers(layers: list[dict]) -> None:
    assert labels(groups(layers)) == [["layer 3"]] * len(layers)


def test_a_deep_model_makes_no_larger_picture() -> None:
    sizes = {}
    for depth in (12, 48):
        drawn = make_graph(structure([entry(layer) for layer in range(depth)]), {}, "deep").source
        sizes[depth] = len(drawn.splitlines())
    assert sizes[12] == sizes[48]


def test_locations_of_a_bare_model() -> None:
    drawn = texts(draw(structure([entry(0)]), {}, "bare"))
    assert [drawn.count(text) for text in ("LoRA", "prefix", "mh_adapter", "output_adapter")] == [5, 1, 1, 1]
    assert "location for LoRA" in drawn and "location for bottleneck" in drawn


def test_only_locations_that_are_there() -> None:
    lacking = entry(0, ffn=False, query=None, attention_residual=False, locations=["self_prefix", "selfattn_lora"])
    drawn = texts(draw(structure([lacking]), {}, "bare"))
    assert drawn.count("LoRA") == 2 and "query" not in drawn
    assert not any("adapter" in text or "FFN" in text or text == "+" for text in drawn)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: getattr(config, "architecture", None) or str(config)[:8])
def test_everything_that_is_grafted_is_drawn(config: object) -> None:
    """One badge for each module of a layer, whatever the configuration."""
    model = torchgraft.graft(base("bert_sdpa", torch.float32), config=config, name="task", verify=False)
    slots = slots_of(model)
    assert sorted(slots) == [0, 1, 2]
    drawn = plain(make_graph(torchgraft.inspect(model), slots, "grafted").source)
    badges = re.findall(r"(?:LoRA, r = |prefix of |bottleneck of )\d+", drawn)
    assert len(badges) == len(slots[0])
    assert "layers 0 to 2" in drawn and "place" not in drawn


def test_sizes_and_gates_of_what_is_grafted() -> None:
    model = torchgraft.graft(base("bert_sdpa", torch.float32), config="unipelt", name="gated")
    lora = torchgraft.LoRAConfig(r=3, selfattn_lora=False, intermediate_lora=True)
    model = torchgraft.graft(model, config=lora, name="plain")
    drawn = texts(draw(torchgraft.inspect(model), slots_of(model), "grafted"))
    # Reduction factor 16 of 48; two gated LoRA on q and v.
    assert drawn.count("LoRA, r = 8, gated") == 2 and drawn.count("LoRA, r = 3") == 1
    assert "prefix of 10, gated" in drawn and "bottleneck of 3, gated" in drawn


def test_slots_of_a_bare_module_are_none() -> None:
    assert slots_of(base("bert_sdpa", torch.float32)) == {}


def edges(drawn: str) -> list[tuple[str, str]]:
    return re.findall(r"^\s*(\w+) -> ([\w:]+)", drawn, re.MULTILINE)


def test_cross_attention_reads_the_encoder_output() -> None:
    drawn = make_graph(encoder_decoder(6), {}, "both").source
    (output,) = re.findall(r'(\w+) \[label="encoder output"', drawn)
    targets = [end.split(":")[1] for start, end in edges(drawn) if start == output]
    assert sorted(targets) == ["key", "value"]
    assert "FFN gate" in drawn and "layers 6 to 11" in plain(drawn)


def test_a_decoder_alone_reads_a_memory() -> None:
    layers = [entry(0, kind="cross", query=projection("q"), key=projection("kv", packed=True),
                    value=projection("kv", packed=True, offset=HIDDEN))]  # fmt: skip
    drawn = make_graph(structure(layers), {}, "decoder").source
    (memory,) = re.findall(r'(\w+) \[label="memory \(an input\)"', drawn)
    assert [end.split(":")[1] for start, end in edges(drawn) if start == memory] == ["key"]  # one box for both
    assert "LoRA on key" in drawn and "LoRA on value" in drawn


def test_markup_in_names_is_text() -> None:
    named = entry(0, notes=["no <output> & no \\N"], query=projection('a<b>&"c'))
    drawn = " ".join(texts(draw(structure([named], ("at x: y",)), {}, 'my "<model>" & co.pt')))
    for text in ("no <output> & no \\N", 'a<b>&"c', 'my "<model>" & co.pt', "not taken: 1 more"):
        assert text in drawn


def test_the_input_is_not_changed() -> None:
    given = encoder_decoder(2)
    before = copy.deepcopy(given)
    draw(given, {}, "both")
    assert given == before


def test_without_dot_the_remedy_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(torchgraft.GraftError, match="'dot', which is not on PATH: run scripts/setup"):
        draw(structure([entry(0)]), {}, "bare")


def test_a_failure_of_dot_is_told(monkeypatch, tmp_path) -> None:
    program = tmp_path / "dot"
    program.write_text("#!/bin/sh\ncat > /dev/null\necho 'no fonts here' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(torchgraft.GraftError, match="dot could not draw the picture: no fonts here"):
        draw(structure([entry(0)]), {}, "bare")
    program.write_text("#!/bin/sh\nexit 3\n")  # at once: whether it is still fed is a matter of chance
    with pytest.raises(torchgraft.GraftError, match="dot could not draw the picture"):
        draw(structure([entry(0)]), {}, "bare")
