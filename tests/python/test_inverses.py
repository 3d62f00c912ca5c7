"""The inverse of an invertible adapter before the output embeddings: where the library has it, and where not."""

import functools
import json
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

import adapters
import torchgraft
from adapters import BertAdapterModel, SeqBnInvConfig
from grafted import base
from models import hugging_face, make_batch
from oracle import difference, randomise

DOUBLE = torch.float64


@functools.cache
def _library() -> nn.Module:
    model = hugging_face("bert", "sdpa", DOUBLE)
    adapters.init(model)
    model.add_adapter("task", config=SeqBnInvConfig())
    model.double()
    randomise(model, "task", 0)
    return model.eval()


@functools.cache
def _directory() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="torchgraft_inverses_"))
    _library().save_adapter(str(folder), "task")
    return folder


class _Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, mask)[0]


class _Restated(nn.Module):
    """The head of the library's model on BERT of transformers: the library's own cannot be traced."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.bert = hugging_face("bert", "sdpa", DOUBLE)
        self.bert.load_state_dict(model.bert.state_dict(), strict=False)
        self.head = model.heads["lm"]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(ids, mask)[0]
        for part in self.head:
            hidden = part(hidden)
        return hidden


def _with_head(kind: type) -> nn.Module:
    torch.manual_seed(1)
    model = kind(hugging_face("bert", "sdpa", DOUBLE).config)
    if kind is BertAdapterModel:
        model.add_masked_lm_head("lm")
        model.set_active_adapters(None)
        model.active_head = "lm"
    return model.double().eval()


@pytest.mark.quick
@pytest.mark.parametrize("kind", [BertForMaskedLM, BertAdapterModel])
def test_a_language_model_is_as_the_library_has_it(kind: type, tmp_path) -> None:
    """With heads of the library the inverse stands before the output embeddings, with those of transformers not."""
    batch = make_batch([9, 6], 9, DOUBLE)
    traced_model = _Logits(_with_head(kind)) if kind is BertForMaskedLM else _Restated(_with_head(kind))
    plain = torch.jit.trace(traced_model, (batch.ids, batch.mask), check_trace=False)
    model = _with_head(kind)
    if kind is BertForMaskedLM:
        adapters.init(model)
    model.add_adapter("task", config=SeqBnInvConfig())
    model.double().eval()
    randomise(model, "task", 3)
    model.save_adapter(str(tmp_path / "read"), "task", with_head=False)
    model.set_active_adapters("task")
    module = torchgraft.load_adapter(plain, tmp_path / "read")
    other = make_batch([8, 5, 8], 8, DOUBLE, seed=2)
    with torch.no_grad():
        expected = model(other.ids, other.mask)[0]
        assert difference(module(other.ids, other.mask), expected) <= 1e-11
        mixed = module(other.ids, other.mask, adapter_ids=torch.tensor([0, -1, 0]))
        assert difference(mixed[::2], expected[::2]) <= 1e-11
        assert difference(mixed[1:2], plain(other.ids, other.mask)[1:2]) <= 1e-11
        torchgraft.save_adapter(module, "task", tmp_path / "written")
        again = torchgraft.load_adapter(plain, tmp_path / "written")
        assert torch.equal(again(other.ids, other.mask), module(other.ids, other.mask))
    has_inverse = any("_forward" not in key for key in module.adapters.state_dict() if "inv_adapter" in key)
    assert has_inverse == (kind is BertAdapterModel)


def test_a_fresh_one_inverts_what_it_changed() -> None:
    """Without layers between, the output embeddings read the embeddings again: as it is defined."""
    batch = make_batch([9, 6], 9, DOUBLE)
    plain = torch.jit.trace(_Logits(_with_head(BertForMaskedLM)), (batch.ids, batch.mask), check_trace=False)
    module = torchgraft.graft(plain, "seq_bn_inv", "task")
    kinds = {key.split(".")[1] for key in module.adapters.state_dict() if "inv_adapter" in key}
    assert kinds == {"inv_adapter_nice_relu"}
    module = torchgraft.graft(plain, "seq_bn_inv[output_adapter=False]", "task")  # nothing else
    with torch.no_grad():
        model = _with_head(BertForMaskedLM)
        weights = {key.rsplit(".", 1)[1]: value for key, value in module.adapters.named_parameters() if "inv" in key}
        for value in weights.values():
            value.normal_(std=0.3)
        block = adapters.methods.modeling.NICECouplingBlock([[48]], non_linearity="relu", reduction_factor=2).double()
        for net, layer in ((net, layer) for net in "FG" for layer in (0, 2)):
            for kind in ("weight", "bias"):
                side = f"{net.lower()}_{'down' if layer == 0 else 'up'}_{kind}"
                getattr(getattr(block, net)[layer], kind).copy_(weights[side][0])
        model.bert.embeddings.register_forward_hook(lambda _, __, output: block(output))
        model.cls.predictions.decoder.register_forward_pre_hook(lambda _, read: (block(read[0], rev=True),))
        assert difference(module(batch.ids, batch.mask), model(batch.ids, batch.mask)[0]) <= 1e-11


def _with_class(name: str | None, directory: Path, **more: object) -> Path:
    """A directory that says its model's class."""
    directory.mkdir()
    for file in _directory().iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_class": name} | more))
    return directory


def _masked_lm(decoder: nn.Module | None = None) -> torch.jit.ScriptModule:
    """BERT with output embeddings, or with another last linear map."""
    model = _with_head(BertForMaskedLM)
    model.cls.predictions.decoder = decoder or model.cls.predictions.decoder
    batch = make_batch([9, 6], 9, DOUBLE)
    return torch.jit.trace(_Logits(model), (batch.ids, batch.mask), check_trace=False)


def _inverts(module: torch.jit.ScriptModule) -> bool:
    return any("inv_adapter" in key and "_forward" not in key for key in module.adapters.state_dict())


@pytest.mark.parametrize("name", ["BertModel", "OfTomorrow", None])
def test_an_inverse_that_is_not_known_is_warned_of(name: str | None, tmp_path) -> None:
    """Only where the model has output embeddings; the key that the warning names settles it."""
    directory = _with_class(name, tmp_path / "a")
    with pytest.warns(UserWarning, match='does not say whether its inverse stood.*add "inverts_output": true or false'):
        module = torchgraft.load_adapter(_masked_lm(), directory, "task")
    assert not _inverts(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torchgraft.load_adapter(base("bert_sdpa", DOUBLE), directory, "task")
        for value in (True, False):
            said = _with_class(name, tmp_path / str(value), inverts_output=value)
            assert _inverts(torchgraft.load_adapter(_masked_lm(), said, "task")) == value
        torchgraft.save_adapter(module, "task", tmp_path / "saved")
        assert not _inverts(torchgraft.load_adapter(_masked_lm(), tmp_path / "saved", "task"))


def test_the_former_name_of_the_librarys_models_inverts(tmp_path) -> None:
    directory = _with_class("BertModelWithHeads", tmp_path / "a")
    assert _inverts(torchgraft.load_adapter(_masked_lm(), directory, "task"))


def test_a_head_of_another_size_is_warned_of(tmp_path) -> None:
    """A vocabulary that is padded: no linear map has as many outputs as the table has rows."""
    padded = _masked_lm(nn.Linear(48, 104).double())
    said = r"no inverse before output embeddings.*cls\.predictions\.decoder"
    with pytest.warns(UserWarning, match=said):
        torchgraft.graft(padded, "seq_bn_inv", "task")
    with pytest.warns(UserWarning, match=said):
        torchgraft.load_adapter(padded, _with_class("BertAdapterModel", tmp_path / "a"), "task")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torchgraft.load_adapter(padded, _with_class("BertForMaskedLM", tmp_path / "b"), "task")
        torchgraft.graft(_masked_lm(nn.Linear(48, 5).double()), "seq_bn_inv", "task")  # labels of tokens


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert = hugging_face("bert", "sdpa", DOUBLE)
        self.first, self.second = (nn.Linear(48, self.bert.config.vocab_size).double() for _ in range(2))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(ids, mask)[0]
        return self.first(hidden) + self.second(hidden)


def test_two_maps_to_the_vocabulary_hinder_the_inverse_only(tmp_path) -> None:
    batch = make_batch([9, 6], 9, DOUBLE)
    model = _TwoHeads().eval()
    plain = torch.jit.trace(model, (batch.ids, batch.mask), check_trace=False)
    said = "several linear maps to the vocabulary.*first, second"
    with pytest.raises(torchgraft.GraftError, match=said):
        torchgraft.graft(plain, "seq_bn_inv", "task")
    with pytest.raises(torchgraft.GraftError, match=said):
        torchgraft.load_adapter(plain, _with_class("BertAdapterModel", tmp_path / "a"), "task")
    module = torchgraft.load_adapter(plain, _with_class("BertForMaskedLM", tmp_path / "b"), "task")
    with torch.no_grad():
        library = _library()
        library.set_active_adapters("task")
        hidden = library(batch.ids, batch.mask)[0]
        assert difference(module(batch.ids, batch.mask), model.first(hidden) + model.second(hidden)) <= 1e-11
