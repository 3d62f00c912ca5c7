"""Adapters in directories: what is written here the oracle reads, and what is damaged is refused."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

import adapters
import torchgraft
from grafted import base, grafted, reloaded
from models import VARIANTS, hugging_face
from oracle import CONFIGS, TOLERANCE, Oracle, Saved, difference, oracle_for, varied_batches
from thinned import thinned
from torchgraft._libraries import patcher


def _loaded_by_the_oracle(oracle: Oracle, directory, name: str, dtype: torch.dtype) -> Saved:
    safetensors = (directory / "adapter.safetensors").exists()
    loaded = oracle.model.load_adapter(str(directory), use_safetensors=safetensors)
    oracle.model.to(dtype).eval()
    # The library makes adapters in float32 and copies into them; what is written is float64.
    weights = (
        patcher().read_safetensors(str(directory / "adapter.safetensors"))
        if safetensors
        else torch.load(directory / "pytorch_adapter.bin", weights_only=True)
    )
    left = set(weights)
    with torch.no_grad():
        ours = {key: parameter for key, parameter in oracle.model.state_dict().items() if key in left}
        for key, parameter in ours.items():
            assert difference(parameter, weights[key].to(torch.float32).to(dtype)) == 0, key
        for key, parameter in ours.items():  # some keys are two names of one parameter
            parameter.copy_(weights[key])
            left.remove(key)
    assert not left, f"keys that the library's model does not have: {sorted(left)}"
    assert loaded == name
    return Saved(name, str(directory))


# The formats differ in the file only: one configuration is enough for the second.
# The library has no way to load a DiReFT: it does not read what says that it is one.
_FILES = [(config, True) for config in CONFIGS if config != "direft"] + [("union_everything", False)]
# One of each kind of parameters. All others are slow.
_OFTEN = ["unipelt", "seq_bn_map", "seq_bn_channel_scaling", "bn_norms_parallel", "lora_all_gated", "dora_gated",
          "ia3", "compacter_factors", "prefix_two_gates", "prefix_leave_out", "loreft", "reft_tied",
          "union_everything"]  # fmt: skip


@pytest.mark.parametrize(("config", "safetensors"), thinned(_FILES, lambda file: file[0] in _OFTEN))
@pytest.mark.parametrize("name", ["bert_sdpa", pytest.param("distilbert_eager", marks=pytest.mark.slow(seconds=1))])
def test_the_oracle_reads_what_is_written(name: str, config: str, safetensors: bool, tmp_path) -> None:
    dtype = torch.float64
    variant = VARIANTS[name]
    module = torchgraft.rename_adapter(grafted(name, dtype, config), "task", f"written_{config}_{safetensors}")
    [saved_name] = module.adapter_names()
    torchgraft.save_adapter(module, saved_name, tmp_path, safetensors=safetensors)
    oracle = oracle_for(variant, dtype)
    saved = _loaded_by_the_oracle(oracle, tmp_path, saved_name, dtype)
    try:
        for batch in varied_batches(variant, dtype):
            expected = oracle.run(variant, batch, saved)
            with torch.no_grad():
                actual = module(*variant.arguments(batch))
            hidden = variant.compared(variant.hidden(actual), batch)
            assert difference(hidden, variant.compared(expected.hidden, batch)) <= TOLERANCE[dtype]
    finally:
        oracle.model.delete_adapter(saved_name)


@pytest.mark.parametrize("config", thinned(CONFIGS, lambda config: config in _OFTEN))
def test_what_is_written_is_read_again(config: str, tmp_path) -> None:
    module = grafted("bert_sdpa", torch.float64, config)
    torchgraft.save_adapter(module, "task", tmp_path)
    again = torchgraft.load_adapter(base("bert_sdpa", torch.float64), tmp_path)
    assert again.active_adapter() == "task"
    variant = VARIANTS["bert_sdpa"]
    for batch in varied_batches(variant, torch.float64):
        with torch.no_grad():
            read, written = (variant.hidden(each(*variant.arguments(batch))) for each in (again, module))
            assert difference(read, written) <= TOLERANCE[torch.float64] / 10


def test_every_weight_is_told_its_place(tmp_path) -> None:
    module = grafted("bert_sdpa", torch.float32, "unipelt")
    torchgraft.save_adapter(module, "task", tmp_path)
    weights = load_file(tmp_path / "adapter.safetensors")
    for name in ("bert_sdpa", "own_post_packed_matmul"):  # by path, and by layer number and location
        matched = dict(torchgraft.match_adapter(base(name, torch.float32), tmp_path))
        assert sorted(matched) == sorted(weights)
        [key] = [key for key in matched if "layer.1." in key and key.endswith("query.loras.task.lora_A")]
        assert matched[key] == "layer 1, selfattn_lora_q: lora_a"
        [pool] = [key for key in matched if "control_trans" in key]
        assert matched[pool] == "the prefixes of self_prefix: flat"


@pytest.mark.quick
def test_an_adapter_fits_a_model_whose_modules_are_called_otherwise(tmp_path) -> None:
    """Saved from a model with packed q, k, v and names of its own, loaded into one of the same structure, and back."""
    config = torchgraft.ConfigUnion(
        torchgraft.PrefixTuningConfig(prefix_length=3, use_gating=True),
        torchgraft.DoubleSeqBnConfig(use_gating=True),
        torchgraft.LoRAConfig(r=3, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True),
    )
    packed = [name for name in VARIANTS if name.startswith("encoder_slow_post")][0]
    first = torchgraft.graft(base(packed, torch.float64), config, "task")
    torchgraft.save_adapter(first, "task", tmp_path / "a")
    second = torchgraft.load_adapter(base("bert_sdpa", torch.float64), tmp_path / "a")
    torchgraft.save_adapter(second, "task", tmp_path / "b")
    third = torchgraft.load_adapter(base(packed, torch.float64), tmp_path / "b")
    for (key, a), (other, b) in zip(first.adapters.named_parameters(), third.adapters.named_parameters(), strict=True):
        assert key == other and torch.equal(a, b)


def test_loading_replaces_one_of_the_same_name_and_keeps_the_active_one(tmp_path) -> None:
    module = torchgraft.graft(base("bert_sdpa", torch.float32), "lora", "a")
    module = torchgraft.graft(module, "seq_bn", "b")
    torchgraft.save_adapter(module, "a", tmp_path)
    added = torchgraft.load_adapter(module, tmp_path, "c")
    assert added.adapter_names() == ["a", "b", "c"] and added.active_adapter() == "b"
    replaced = torchgraft.load_adapter(module, tmp_path, "b")
    assert replaced.adapter_names() == ["a", "b"] and json.loads(replaced.adapter_config("b"))["architecture"] == "lora"
    module.deactivate()
    assert torchgraft.load_adapter(module, tmp_path, "d").active_adapter() is None


def test_writing_leaves_one_format(tmp_path) -> None:
    module = torchgraft.graft(base("bert_sdpa", torch.float32), "mam", "task")
    torchgraft.save_adapter(module, "task", tmp_path, safetensors=False)
    torchgraft.save_adapter(reloaded(module), "task", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    assert load_file(tmp_path / "adapter.safetensors")  # the reference implementation reads it


def test_an_unknown_name_lists_the_known_ones(tmp_path) -> None:
    module = grafted("bert_sdpa", torch.float32, "lora")
    with pytest.raises(torchgraft.GraftError, match="no adapter is called 'x'; there are: task"):
        torchgraft.save_adapter(module, "x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def _file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


_HOSTILE = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x01\x00\x00", "not a safetensors file"),
    "huge header": (_file({}, length=2**63), "claims"),
    "header over the end": (_file({}, length=3), "claims 3 bytes"),
    "not JSON": (_file(b"{{{{"), "its header: not JSON"),
    "a list": (_file([]), "not a JSON object"),
    "deep": (_file(b"[" * 100_000), "nested too deeply"),
    "twice": (_file(b'{"a":{},"a":{}}'), "twice"),
    "no fields": (_file({"a": {}}), "expected dtype, shape and data_offsets"),
    "unknown dtype": (_file({"a": _entry(0, 4, [1], "F5")}, b"1234"), "is not known"),
    "truncated": (_file({"a": _entry(0, 8, [2])}, b"1234"), "is the file truncated"),
    "backwards": (_file({"a": _entry(4, 0, [1])}, b"1234"), "outside"),
    "negative size": (_file({"a": _entry(0, 4, [-1])}, b"1234"), "sizes of at least 0"),
    "overflow": (_file({"a": _entry(0, 4, [2**62, 2**62])}, b"1234"), "too many"),
    "wrong size": (_file({"a": _entry(0, 4, [2])}, b"1234"), "need 8 bytes"),
    "overlap": (_file({"a": _entry(0, 8, [2]), "b": _entry(4, 12, [2])}, b"1" * 12), "inside another's"),
    "gap": (_file({"a": _entry(0, 4, [1]), "b": _entry(8, 12, [1])}, b"1" * 12), "after a gap"),
    "left over": (_file({"a": _entry(0, 4, [1])}, b"12345678"), "4 bytes after its last tensor"),
}


@pytest.mark.quick
@pytest.mark.parametrize(("content", "message"), _HOSTILE.values(), ids=_HOSTILE)
def test_a_damaged_or_hostile_file_is_refused(content: bytes, message: str, tmp_path) -> None:
    torchgraft.save_adapter(grafted("bert_sdpa", torch.float32, "lora"), "task", tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(content)
    with pytest.raises(torchgraft.GraftError, match=message) as raised:
        torchgraft.load_adapter(base("bert_sdpa", torch.float32), tmp_path)
    assert "adapter.safetensors" in str(raised.value)


@pytest.mark.quick
def test_every_dtype_of_the_reference_implementation_is_read(tmp_path) -> None:
    tensors = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                      torch.int16, torch.int8, torch.uint8, torch.bool)
    }  # fmt: skip
    tensors |= {"scalar": torch.tensor(2.5), "nothing": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    patcher().write_safetensors(tensors, str(tmp_path / "b.safetensors"))
    for name, read in (("a", patcher().read_safetensors), ("b", load_file)):
        found = read(str(tmp_path / f"{name}.safetensors"))
        assert sorted(found) == sorted(tensors)
        for key, tensor in tensors.items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


@pytest.mark.parametrize("shared_blocks", [False, True])
def test_compacter_with_shared_factors(shared_blocks: bool, tmp_path) -> None:
    """The library saves what all modules share only from a model with a head."""
    with_head = BertForSequenceClassification(hugging_face("bert", "sdpa", torch.float64).config).double()
    with_head.bert.load_state_dict(hugging_face("bert", "sdpa", torch.float64).state_dict(), strict=False)
    adapters.init(with_head)
    config = adapters.CompacterConfig(reduction_factor=4, phm_init_range=0.5, shared_W_phm=shared_blocks)
    with_head.add_adapter("task", config=config)
    with_head.double().eval()
    with_head.save_adapter(str(tmp_path / "head"), "task", with_head=False)
    with_head.set_active_adapters("task")
    variant = VARIANTS["bert_sdpa"]
    module = torchgraft.load_adapter(base("bert_sdpa", torch.float64), tmp_path / "head")
    for batch in varied_batches(variant, torch.float64):
        with torch.no_grad():
            expected = with_head.bert(batch.ids, batch.mask)[0]
            actual = variant.hidden(module(*variant.arguments(batch)))
        assert difference(actual, expected) <= TOLERANCE[torch.float64]
    trainable = torchgraft.load_adapter(base("bert_sdpa", torch.float64), tmp_path / "head", trainable=True)
    with torch.no_grad():
        for parameter in torchgraft.trainable_parameters(trainable, "task").values():
            parameter.mul_(1.1)
        torchgraft.save_adapter(trainable, "task", tmp_path / "trained")
        # Under its own name: when the library renames, it forgets shared factors that have no model's name before them.
        with_head.delete_adapter("task")
        with_head.set_active_adapters(with_head.load_adapter(str(tmp_path / "trained"), use_safetensors=True))
        with_head.double().eval()
        expected = with_head.bert(batch.ids, batch.mask)[0]
        actual = variant.hidden(trainable(*variant.arguments(batch)))
        assert difference(actual, expected) <= 1e-5  # the library loads into float32
    weights = torch.load(tmp_path / "head" / "pytorch_adapter.bin", weights_only=True)
    left = {key: value for key, value in weights.items() if "shared" not in key}
    torch.save(left, tmp_path / "head" / "pytorch_adapter.bin")
    with pytest.raises(torchgraft.GraftError, match="which all modules of the adapter share, is missing"):
        torchgraft.load_adapter(base("bert_sdpa", torch.float64), tmp_path / "head")


class _InLists(torch.nn.Module):
    """Lists hold one projection of each layer, so that the last number of a path is its only one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.up, self.down = (
            torch.nn.ModuleList([torch.nn.Linear(32, 32) for _ in range(3)]) for _ in range(6)
        )
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(32) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(3):
            q, k, v = (map_[i](x).unflatten(-1, (4, 8)).transpose(1, 2) for map_ in (self.q, self.k, self.v))
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = self.norms[2 * i](x + self.out[i](mixed.transpose(1, 2).flatten(2)))
            x = self.norms[2 * i + 1](x + self.down[i](torch.relu(self.up[i](x))))
        return x


@pytest.mark.parametrize(
    "config", ["unipelt", "mam", "double_seq_bn", "lora[intermediate_lora=True, output_lora=True]"]
)
def test_layers_in_lists_keep_their_weights_apart(config: str, tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    plain = torch.jit.trace(_InLists().eval(), x)
    module = torchgraft.graft(plain, config, "task")
    for parameter in module.adapters.parameters():
        parameter.data.normal_(std=0.3)
    torchgraft.save_adapter(module, "task", tmp_path)
    again = torchgraft.graft(plain, adapters={"task": tmp_path})
    with torch.no_grad():
        torch.testing.assert_close(again(x), module(x))
        assert not torch.allclose(module(x), plain(x))
