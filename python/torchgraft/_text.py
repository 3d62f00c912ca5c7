"""Turns texts into the arguments of a model's forward."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

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


def text_arguments(method: Any, values: Mapping[str, Tensor], command: str) -> list[Any]:
    """Returns the arguments for a method of a grafted module, up to the last one that a text gives.

    A Tensor argument whose name contains "mask" or "type" gets the mask or the token types. The first other Tensor
    argument gets the token ids. Arguments between these get their defaults.

    Args:
        method: forward, forward_with_gates, ... of a ScriptModule.
        values: "ids", "mask" and "type", each int64 [B, S].
        command: the name of the caller, for messages.

    Raises:
        GraftError: the method takes no token ids, or needs an argument that a text does not give.
    """
    result: list[Any] = []
    given: dict[str, int] = {}  # kind -> position
    for parameter in method.schema.arguments[1:]:
        kind = _kind(parameter, known=given.keys())
        if kind is not None:
            given[kind] = len(result)
            result.append(values[kind])
        elif parameter.has_default_value():
            result.append(parameter.default_value)
        else:
            raise GraftError(
                f"{command}: forward needs the argument '{parameter.name}', and a text gives token ids, a mask and "
                "token types only; call the module from Python"
            )
    if "ids" not in given:
        raise GraftError(f"{command}: forward takes no token ids; call the module from Python")
    return result[: max(given.values()) + 1]


def _kind(parameter: Any, known: Collection[str]) -> str | None:
    """Returns which of a text's values the argument gets; None: none of them."""
    if str(parameter.type) not in ("Tensor", "Optional[Tensor]"):
        return None
    named = next((kind for kind in ("mask", "type") if kind in parameter.name), None)
    return named or ("ids" if "ids" not in known else None)
