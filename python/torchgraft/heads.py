"""Task heads: small networks on the last hidden states, saved and served with an adapter."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ._libraries import patcher
from ._reading import parse_json
from .errors import GraftError
from .grafting import cpp_module, script_module


@dataclass(frozen=True)
class HeadConfig:
    """The configuration of a head of the `adapters` library: pooling, then `layers` linear maps with dropout before
    each.

    Attributes:
        head_type: "classification", "multilabel_classification" or "tagging" (logits for each token). A regression is a
            classification with num_labels=1, as in the library.
        num_labels: the number of logits.
        layers: the number of linear maps. All but the last keep the hidden size and have `activation_function` behind
            them.
        activation_function: the name of a non-linearity, or None.
        labels: the names of the labels, in the order of the logits. None: the labels have no names.
        bias: whether the last linear map has a bias.
        dropout_prob: the probability of dropout. None: 0.
        pooling: which hidden states the head reads: of the "first" token (what the library does), the "mean" over real
            tokens, or of the "last" real token.
    """

    head_type: str = "classification"
    num_labels: int = 2
    layers: int = 2
    activation_function: str | None = "tanh"
    labels: Sequence[str] | None = None
    bias: bool = True
    dropout_prob: float | None = None
    pooling: str = "first"

    def to_json(self) -> str:
        """Returns the text of a head_config.json.

        Raises:
            GraftError: `labels` does not hold `num_labels` different names.
        """
        if self.labels is not None and len(set(self.labels)) != self.num_labels:
            raise GraftError(f"head: expected {self.num_labels} different labels (num_labels), got {list(self.labels)}")
        fields: dict[str, Any] = asdict(self)
        labels, pooling = fields.pop("labels"), fields.pop("pooling")
        fields["label2id"] = None if labels is None else {label: index for index, label in enumerate(labels)}
        return json.dumps({"config": fields, "pooling": pooling})

    @staticmethod
    def from_json(text: str) -> "HeadConfig":
        """Returns the configuration whose to_json() gave `text`."""
        content = parse_json(text, "head")
        fields = content["config"]
        label2id, _ = fields.pop("label2id"), fields.pop("use_pooler", None)
        labels = None if label2id is None else tuple(sorted(label2id, key=label2id.__getitem__))
        return HeadConfig(**fields, labels=labels, pooling=content["pooling"])


def add_head(
    module: torch.jit.ScriptModule, name: str, config: HeadConfig, token_mask: str | None = None
) -> torch.jit.ScriptModule:
    """Returns a copy in which the adapter `name` has a head with fresh weights. The head is trainable if the adapter
    is. A composition with a Fuse can have a head, too, which is trained with its AdapterFusion layers.

    The copy has the method `forward_with_head(..., adapter_ids=None)` with forward's arguments. It returns logits [B,
    L], for tagging [B, S, L]. In a batch that mixes adapters, L is the largest number of labels of all heads; columns
    beyond the labels of a row's head are -inf. The head reads forward's result: a Tensor [B, S, H], the first Tensor of
    a tuple, or the entry "last_hidden_state" of a dict.

    Args:
        module: a grafted module.
        name: the adapter, or a composition with a Fuse. If it has a head, the new one replaces it.
        config: the head's configuration.
        token_mask: the name of forward's argument that says which tokens are real ([B, S], non-zero = real). None:
            "attention_mask", or "decoder_attention_mask" in a model with cross attention; if forward has no such
            argument, all tokens are real. All heads of a module share it.

    Raises:
        GraftError: the adapter is unknown, a field is not supported, `labels` does not fit `num_labels`, or the other
            heads have another token mask.
        TypeError: `module` is not TorchScript.
    """
    return script_module(patcher().add_head(cpp_module(module), name, config.to_json(), token_mask or ""))


def remove_head(module: torch.jit.ScriptModule, name: str) -> torch.jit.ScriptModule:
    """Returns a copy in which the adapter has no head.

    Raises:
        GraftError: the adapter is unknown.
        TypeError: `module` is not TorchScript.
    """
    return script_module(patcher().remove_head(cpp_module(module), name))


def head_config(module: torch.jit.ScriptModule, name: str) -> HeadConfig | None:
    """Returns the configuration of an adapter's head, or None if it has no head.

    Raises:
        GraftError: the adapter is unknown.
        TypeError: `module` is not TorchScript.
    """
    text = patcher().head_config(cpp_module(module), name)
    return HeadConfig.from_json(text) if text else None
