"""EncoderDecoderModel of two BERTs against the library: each has its own prefixes, and mh_adapter also follows cross
attention."""

import functools

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import adapters
import oracle
import torchgraft
from hugging_face_models import FAMILIES

_SIZES = FAMILIES["bert"].sizes
_CONFIGS = {name: oracle.CONFIGS[name] for name in (
    "seq_bn", "seq_bn_both", "par_bn_both", "lora_all", "prefix_gated", "prefix_flat", "mam", "unipelt",
    "union_everything")}  # fmt: skip
_CONFIGS["cross"] = adapters.DoubleSeqBnConfig(cross_adapter=True)


class _Model(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, decoder_ids: Tensor, decoder_mask: Tensor) -> Tensor:
        return self.model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, decoder_attention_mask=decoder_mask
        )[0]


def _make() -> _Model:
    decoder = hf.BertConfig(**_SIZES | dict(num_hidden_layers=3, intermediate_size=72))
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**_SIZES), decoder)
    for part in (config, config.encoder, config.decoder):
        part._attn_implementation = "eager"
    config.decoder.use_cache = False
    model = hf.EncoderDecoderModel(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2, generator=generator)
    return _Model(model.double())


def _arguments(seed: int, rows: int, width: int, decoder_width: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, width, dtype=torch.int64)
    decoder_mask = torch.ones(rows, decoder_width, dtype=torch.int64)
    mask[0, width - 3 :] = 0
    decoder_mask[-1, decoder_width - 2 :] = 0
    return (torch.randint(3, 97, (rows, width), generator=generator), mask,
            torch.randint(3, 97, (rows, decoder_width), generator=generator), decoder_mask)  # fmt: skip


@functools.cache
def _base() -> torch.jit.ScriptModule:
    return torch.jit.trace(_make(), _arguments(0, 2, 9, 6), check_trace=False, strict=False)


@functools.cache
def _library() -> _Model:
    model = _make()
    adapters.init(model.model)
    return model


@pytest.mark.parametrize("name", _CONFIGS)
def test_equals_the_library(name: str, tmp_path) -> None:
    library = _library()
    oracle.make_oracle_adapter(library.model, _CONFIGS[name], name, 3)
    library.model.save_adapter(str(tmp_path), name)
    library.model.eval().set_active_adapters(name)
    arguments = _arguments(1, 3, 7, 5)
    grafted = torchgraft.load_adapter(_base(), tmp_path)
    torchgraft.save_adapter(grafted, name, tmp_path / "again")
    again = torchgraft.load_adapter(_base(), tmp_path / "again")
    with torch.no_grad():
        expected = library(*arguments)
        library.model.set_active_adapters(None)
        assert oracle.difference(library(*arguments), expected) > 0.05
        assert oracle.difference(grafted(*arguments), expected) <= 1e-10
        assert oracle.difference(again(*arguments), expected) <= 1e-10
