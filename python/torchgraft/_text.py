"""Turns texts into the arguments of a model's forward."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._libraries import patcher
from .errors import GraftError


def load_tokenizer(path: Path, max_length: int) -> Any:
    """Loads a tokenizers.Tokenizer that pads, and cuts texts to `max_length` tokens.

    Args:
        path: a tokenizer.json, or the folder that holds one. If the file does not say how to pad, token 0 pads.
        max_length: the most tokens of a text.

    Raises:
        GraftError: the file is missing, or is not a tokenizer.json.
    """
    from tokenizers import Tokenizer

    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise GraftError(f"{path}: no such file; give --tokenizer TOKENIZER.json, as Hugging Face models have it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no class of its own
        raise GraftError(f"{path}: not a tokenizer ({str(error).splitlines()[0]})") from error
    padding = tokenizer.padding or {}
    tokenizer.enable_padding(**{key: padding[key] for key in ("pad_id", "pad_token", "pad_type_id") if key in padding})
    tokenizer.enable_truncation(max_length)
    return tokenizer


def forward_inputs(method: Any) -> Any:
    """Returns which arguments of a text encoder take the token ids, the mask and the token types.

    Names decide: a Tensor or Optional[Tensor] with "mask" in its name takes the mask, another with "type" in its name
    the token types, the first of the others the ids. Every other argument keeps its default. The result has

    - `arguments(ids, mask=None, types=None)`: the positional arguments up to the last that the text gives, of tensors
      [B, S] int64; without types all are 0;
    - `takes_mask`: without a mask a model reads padding as tokens.

    Args:
        method: forward, forward_with_gates, ... of a ScriptModule.

    Raises:
        GraftError: a text gives nothing for an argument that has no default, or none takes the ids.
    """
    return patcher().ForwardInputs(method.schema)


@dataclass(frozen=True)
class TextLimits:
    """Which texts a model takes, as far as its graph shows it.

    Attributes:
        vocabulary: token ids are below it. None: the graph does not show it.
        positions: the most tokens of a text. None: there is no such limit, or the graph does not show it.
    """

    vocabulary: int | None
    positions: int | None

    def check(self, ids: Sequence[int], where: str) -> None:
        """Checks the token ids of one text. `where` names it in messages.

        Raises:
            GraftError: the text has no tokens, too many, or one that the model does not have. The message has the
                remedy.
        """
        if not ids:
            raise GraftError(f"{where} has no tokens: the tokenizer makes none of its text; leave it out")
        fault = self.fault(ids)
        if fault is None:
            return
        is_too_long, message = fault
        remedy = (
            f"give --max-length {self.positions}"
            if is_too_long
            else "give the tokenizer that belongs to the model (--tokenizer)"
        )
        raise GraftError(f"{where}: {message}; {remedy}")

    def fault(self, ids: Sequence[int]) -> tuple[bool, str] | None:
        """Returns what is wrong with the token ids of one text: whether it is too long, and a message. None: nothing.

        A text that is not too long has a token that the model does not have.
        """
        return patcher().text_fault(self.vocabulary, self.positions, list(ids))


def text_limits(module: torch.jit.ScriptModule) -> TextLimits:
    """Reads the limits of a text encoder, grafted or not, from its graph.

    Raises:
        GraftError: forward takes no token ids.
    """
    return TextLimits(*patcher().text_limits(module._c))


@contextlib.contextmanager
def of_texts(command: str, module: torch.jit.ScriptModule) -> Iterator[None]:
    """What runs inside runs `module` on token ids. Where that fails, and the graph shows no table of words, the error
    says that forward takes something else; what went wrong inside of it would help nobody."""
    try:
        yield
    except (RuntimeError, torch.jit.Error, GraftError) as error:
        if text_limits(module).vocabulary is not None:
            raise
        forward: Any = module.forward  # a ScriptMethod
        names = ", ".join(argument.name for argument in forward.schema.arguments[1:])
        remedy = "give --example FILE" if command == "export" else "call the module from Python"
        raise GraftError(
            f"{command}: forward({names}) does not run on the token ids of texts, and its graph shows no table of "
            f"words that takes them; {remedy}"
        ) from error


def text_arguments(method: Any, values: Mapping[str, Tensor], command: str) -> list[Any]:
    """Returns the arguments for a method of a grafted module, up to the last one that a text gives.

    Args:
        method: forward, forward_with_gates, ... of a ScriptModule; forward_inputs says which argument gets what.
        values: "ids", "mask" and "type", each int64 [B, S].
        command: the name of the caller, for messages.

    Raises:
        GraftError: the method takes no token ids, or needs an argument that a text does not give.
    """
    try:
        return forward_inputs(method).arguments(values["ids"], values["mask"], values["type"])
    except GraftError as error:
        raise GraftError(f"{command}: {error}, or call the module from Python") from None
