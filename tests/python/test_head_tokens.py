"""Which token a head of the library reads depends on its model."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import adapters
import torchgraft

_SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
_TOKENS = dict(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_GPT = dict(n_embd=24, n_layer=2, n_head=4, n_inner=40, n_positions=32)
_LAST = {
    "gpt2": hf.GPT2Config(**_GPT, **_TOKENS),
    "gptj": hf.GPTJConfig(**_GPT, rotary_dim=4, **_TOKENS),
    "llama": hf.LlamaConfig(**_SIZES, **_TOKENS),
    "mistral": hf.MistralConfig(**_SIZES, num_key_value_heads=2, **_TOKENS),
}
_BART = dict(d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
_OTHER = {
    "bart": hf.BartConfig(**_BART, encoder_ffn_dim=40, decoder_ffn_dim=40, **_TOKENS),
    "t5": hf.T5Config(d_model=24, num_layers=1, num_heads=4, d_kv=6, d_ff=40, decoder_start_token_id=0, **_TOKENS),
}


class _Decoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, causal_mask: Tensor) -> Tensor:
        """attention_mask: [B, S], which real tokens there are, is for the head; causal_mask: [B, 1, S, S], added."""
        return self.model(input_ids=input_ids, attention_mask=causal_mask)[0]


def _causal(mask: Tensor) -> Tensor:
    seen = mask[:, None, None, :].bool() & torch.ones(7, 7, dtype=torch.bool).tril()
    return torch.zeros(seen.shape).masked_fill(~seen, -1e9)


def _inputs(seed: int) -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    return torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(seed)) * mask, mask


def _with_head(config: hf.PretrainedConfig, folder: Path) -> nn.Module:
    """A model of the library with an adapter and a head, all random, which are saved in the folder."""
    torch.manual_seed(0)
    config.use_cache = config.return_dict = False
    config._attn_implementation = "eager"
    model = adapters.AutoAdapterModel.from_config(config)
    model.add_adapter("task", config="seq_bn")
    model.add_classification_head("task", num_labels=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.set_active_adapters("task")
    model.eval().save_adapter(str(folder), "task")
    return model


@pytest.mark.parametrize("name", _LAST)
def test_the_last_real_token_of_a_decoder(name: str, tmp_path: Path) -> None:
    model = _with_head(_LAST[name], tmp_path)
    ids, mask = _inputs(1)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)[0]
        assert expected.shape == (3, 3)
        plain = hf.AutoModel.from_config(_LAST[name]).eval()
        plain.load_state_dict(model.base_model.state_dict(), strict=False)
        example = (*_inputs(0), _causal(mask))
        base = torch.jit.trace(_Decoder(plain), example, check_trace=False, strict=False)
        module = torchgraft.load_adapter(base, tmp_path)
        assert torchgraft.head_config(module, "task").pooling == "last"
        torch.testing.assert_close(module.forward_with_head(ids, mask, _causal(mask)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", _OTHER)
def test_the_loss_of_a_head_that_reads_another_token_is_said(name: str, tmp_path: Path) -> None:
    """BART and T5 read the last end-of-sequence token."""
    model = _with_head(_OTHER[name], tmp_path)
    ids, mask = _inputs(1)
    ids[:, 0] = 2
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask)[0]
    assert logits.shape == (3, 3)
    with pytest.warns(UserWarning, match=r"the adapter's head \(classification\) is not loaded"):
        assert torchgraft.load_adapter_directory(tmp_path).head is None
