"""Task heads: a small network on the last hidden states, kept with an adapter, saved and served with it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ._libraries import patcher
from .errors import GraftError
from .grafting import cpp_module, script_module


@dataclass(frozen=True)
class HeadConfig:
    """A head of the `adapters` library: pooling, then `layers` linear maps with dropout before each.

    Attributes:
        head_type: "classification", "multilabel_classification" or "tagging" (a result per token). A regression is a
            classification with num_labels=1, as in the library.
        num_labels: columns of the logits.
        layers: linear maps; all but the last keep the hidden size and are followed by `activation_function`.
        activation_function: a non-linearity by name, or None.
        labels: the labels' names, in the order of the logits; their number is `num_labels`.
        bias: whether the last linear map has one.
        dropout_prob: None is 0.
        pooling: "first" token (what the library does), "mean" over real tokens or "last" real token.
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
        """The text of a head_config.json.

        Raises:
            GraftError: the labels are not `num_labels` different ones.
        """
        if self.labels is not None and len(set(self.labels)) != self.num_labels:
            raise GraftError(f"head: expected {self.num_labels} different labels (num_labels), got {list(self.labels)}")
        fields: dict[str, Any] = asdict(self)
        labels, pooling = fields.pop("labels"), fields.pop("pooling")
        fields["label2id"] = None if labels is None else {label: index for index, label in enumerate(labels)}
        return json.dumps({"config": fields, "pooling": pooling})

    @staticmethod
    def from_json(text: str) -> "HeadConfig":
        """What to_json() was called on."""
        content = json.loads(text)
        fields = content["config"]
        label2id, _ = fields.pop("label2id"), fields.pop("use_pooler", None)
        labels = None if label2id is None else tuple(sorted(label2id, key=label2id.__getitem__))
        return HeadConfig(**fields, labels=labels, pooling=content["pooling"])


def add_head(
    module: torch.jit.ScriptModule, name: str, config: HeadConfig, token_mask: str | None = None
) -> torch.jit.ScriptModule:
    """A copy in which the adapter `name` has a head with fresh weights; it is trainable if the adapter is.

    The copy has the method `forward_with_head(..., adapter_ids=None)` with forward's arguments. It returns logits
    [B, L], for tagging [B, S, L]. In a mixed batch L is the largest number of labels of all heads, and columns that a
    row's head does not have are -inf. The head reads what forward returns: a Tensor [B, S, H], the first of a tuple, or
    the entry "last_hidden_state" of a dict.

    Args:
        module: a grafted module.
        name: of the adapter. A head that it has is replaced.
        config: what the head is.
        token_mask: the argument of forward that says which tokens are real ([B, S], non-zero = real). None:
            "attention_mask", or "decoder_attention_mask" of a model with cross attention, if forward has it, else all
            are. All heads of a module share it.

    Raises:
        GraftError: an unknown adapter, an unsupported field, or another token mask than that of the other heads.
    """
    return script_module(patcher().add_head(cpp_module(module), name, config.to_json(), token_mask or ""))


def remove_head(module: torch.jit.ScriptModule, name: str) -> torch.jit.ScriptModule:
    """A copy in which the adapter has no head."""
    return script_module(patcher().remove_head(cpp_module(module), name))


def head_config(module: torch.jit.ScriptModule, name: str) -> HeadConfig | None:
    """The head of an adapter; None when it has none."""
    text = patcher().head_config(cpp_module(module), name)
    return HeadConfig.from_json(text) if text else None
