"""The options of a run that goes on: as its checkpoint has them, but for what does not change its weights."""

import argparse
import re
from pathlib import Path
from typing import Any

from torchgraft_command.train_arguments import make_parser

from ..configs import config_argument
from ..errors import GraftError
from .checkpoint import TrainingState, load_checkpoint

# May be another in a run that goes on: what is written, and where the run computes.
_FREE = {"test", "model_class", "checkpoint_every", "device", "tensorboard", "save_model"}
# Their effect is compared, not their text: files by content, the others by what they make (check_same_run).
_BY_EFFECT = {"model", "train", "validation", "tokenizer", "config", "start", "labels", "gate_pooling"}
# Of the command that goes on. A library is code that runs: no file names it in the user's stead.
_NOT_KEPT = {"help", "output", "resume", "restart", "library"}
_DIGEST = re.compile(r"[0-9a-f]{16}")


def _actions() -> dict[str, argparse.Action]:
    return {action.dest: action for action in make_parser()._actions if action.dest not in _NOT_KEPT}


def kept_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what a checkpoint keeps of a command line: numbers and texts, among them absolute paths."""
    values = {name: getattr(arguments, name) for name in _actions()}
    if isinstance(config_argument(values["config"]), Path):
        values["config"] = Path(values["config"])
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in values.items()}


def with_kept_options(arguments: argparse.Namespace, checkpoint: Path) -> argparse.Namespace:
    """Returns the command line of a run that goes on from `checkpoint`. What `arguments.given` does not name is as in
    the checkpoint.

    Raises:
        GraftError: an option is given otherwise than in the run before; or the checkpoint keeps no options, and the
            command line does not say enough.
    """
    state = load_checkpoint(checkpoint)
    actions = _actions()
    if not state.arguments:
        _check_says_enough(arguments, state, checkpoint, actions)
        return arguments
    kept = _checked(state.arguments, checkpoint, actions)
    given = arguments.given & actions.keys()
    others = [name for name in actions if name in given and _is_other(name, getattr(arguments, name), kept[name])]
    if others:
        had = ", ".join(_shown(actions[name], kept[name]) for name in others)
        got = ", ".join(_shown(actions[name], getattr(arguments, name)) for name in others)
        raise GraftError(
            f"{checkpoint}: its run had {had}, and the command line gives {got}; leave that out to go on with the run, "
            "or start anew with --restart or another --output"
        )
    values = {name: value for name, value in kept.items() if name not in given}
    return argparse.Namespace(**(vars(arguments) | values))


def _is_other(name: str, given: Any, kept: Any) -> bool:
    if name in _FREE or name in _BY_EFFECT - {"validation", "start"}:
        return False
    return kept is None if name in _BY_EFFECT else given != kept


def _checked(kept: dict[str, Any], checkpoint: Path, actions: dict[str, argparse.Action]) -> dict[str, Any]:
    """Returns the options of a checkpoint, each of the type that its option has."""
    if kept.keys() != actions.keys():
        raise GraftError(
            f"{checkpoint}: the options in it are those of another version of torchgraft; start anew with --restart or "
            "another --output"
        )
    result = {}
    for name, value in kept.items():
        action = actions[name]
        is_flag = action.nargs == 0
        expected: Any = bool if is_flag else action.type or str
        held = str if expected is Path else expected
        is_missing = value is None and action.default is None and name not in ("model", "train")
        is_fine = type(value) is held and (action.choices is None or value in action.choices)
        if not is_missing and not is_fine:
            raise GraftError(f"{checkpoint}: not a checkpoint: its option {name} is {str(value)[:200]}")
        result[name] = Path(value) if expected is Path and value is not None else value
    return result


def _check_says_enough(
    arguments: argparse.Namespace, state: TrainingState, checkpoint: Path, actions: dict[str, argparse.Action]
) -> None:
    """Checks the command line of a run whose checkpoint keeps settings, as those of before did, but no options."""
    if arguments.model is not None and arguments.train is not None:
        return
    settings = {name: str(value) for name, value in state.settings.items()}
    words = ["BASE.pt", "--train FILE"]
    for name, action in actions.items():
        value = settings.get(name, str(action.default))
        if name in ("config", "start") and _DIGEST.fullmatch(value):
            words.append(f"{action.option_strings[-1]} {action.metavar or 'FILE'}")
        elif name not in ("model", "start", "gate_pooling") and value != str(action.default):
            words.append(_shown(action, value))
    if settings.get("gate_pooling") == "unpadded":
        words.append("--gate-pooling unpadded")
    if settings.get("validation examples", "none") != "none":
        words.append("--validation or --validation-fraction")
    raise GraftError(
        f"{checkpoint}: it was written before checkpoints kept the options of their run; give them again: "
        f"{', '.join(words)}, and how texts and classes were read, where that was no default"
    )


def _shown(action: argparse.Action, value: Any) -> str:
    """Returns an option as a command line has it: "--epochs 3", "no --start"."""
    option = action.option_strings[-1] if action.option_strings else str(action.metavar)
    if action.nargs == 0:
        return option if value != action.default else f"no {option}"
    return f"no {option}" if value is None else f"{option} {value}"
