"""From texts to the arguments of a model's forward."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import GraftError


def load_tokenizer(path: Path, max_length: int) -> Any:
    """The tokenizers.Tokenizer that a tokenizer.json (or the folder that holds it) describes; longer texts are cut.

    It pads as its file says, else with token 0.

    Raises:
        GraftError: there is no such file, or it is something else.
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
    """The arguments that a method of a grafted module takes, up to the last that a text gives; those between have their
    defaults. Of the tensors, a mask and types are known by name, token ids are the first of the others.

    Args:
        method: forward, forward_with_gates, ... of a ScriptModule.
        values: "ids", "mask" and "type", each [B, S] int64.
        command: who asks, for the message.

    Raises:
        GraftError: the method needs something that a text does not give.
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
            raise GraftError(f"{command}: forward's argument '{parameter.name}' is none that a text gives (token ids, "
                             "a mask, token types); call the module from Python")  # fmt: skip
    if "ids" not in given:
        raise GraftError(f"{command}: forward takes no token ids; call the module from Python")
    return result[: max(given.values()) + 1]


def _kind(parameter: Any, known: Collection[str]) -> str | None:
    """What of a text an argument takes; None: nothing."""
    if str(parameter.type) not in ("Tensor", "Optional[Tensor]"):
        return None
    named = next((kind for kind in ("mask", "type") if kind in parameter.name), None)
    return named or ("ids" if "ids" not in known else None)
