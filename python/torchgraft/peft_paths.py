"""Finds the linear maps of a model that the updates of a PEFT directory are for, by module path."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import GraftError

_MOST_SHOWN = 10  # paths in an error
_LONGEST_SHOWN = 200  # characters of one of several paths


@dataclass(frozen=True)
class Place:
    """Where an update belongs.

    Attributes:
        path: the linear map's path in the model.
        model_prefix: what precedes the part of that path which PEFT's path has, too.
        peft_prefix: what precedes that part in PEFT's path.
    """

    path: str
    model_prefix: str
    peft_prefix: str


def place_of(model_path: str, peft_path: str) -> tuple[int, Place] | None:
    """Compares two paths from their ends: a model may have been traced inside a head or a wrapper, or without one.

    Returns:
        How many components they share, and the place; None: they are not paths of one linear map. They are if one is
        the end of the other, or if they share a layer's number and its container.
    """
    model, saved = model_path.split("."), peft_path.split(".")
    shared = 0
    while shared < min(len(model), len(saved)) and model[-1 - shared] == saved[-1 - shared]:
        shared += 1
    number = next((index for index, component in enumerate(saved) if component.isdigit()), None)
    holds_a_layer = number is not None and number >= 1 and len(saved) - shared <= number - 1
    if shared < min(len(model), len(saved)) and not holds_a_layer:
        return None
    return shared, Place(model_path, ".".join(model[: len(model) - shared]), ".".join(saved[: len(saved) - shared]))


def shown_paths(paths: Iterable[str]) -> str:
    """Returns the first of several paths, each cut if it is long, for a message."""
    every = [path if len(path) <= _LONGEST_SHOWN else path[:_LONGEST_SHOWN] + "..." for path in paths]
    more = len(every) - _MOST_SHOWN
    return ", ".join(every[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _best_places(peft_path: str, model_paths: list[str]) -> list[Place]:
    """Returns the linear maps whose paths share most components with PEFT's."""
    found = [place for place in (place_of(model_path, peft_path) for model_path in model_paths) if place]
    longest = max((shared for shared, _ in found), default=0)
    return [place for shared, place in found if shared == longest]


def _common_prefixes(best_of_paths: Iterable[list[Place]]) -> tuple[str, str] | None:
    """Returns what precedes the common part in the model and in PEFT's paths, if only one pair of prefixes serves all
    updates. The paths as they stand (no prefixes) come before others."""
    serving = [{(place.model_prefix, place.peft_prefix) for place in best} for best in best_of_paths]
    common = set.intersection(*serving) if serving else set()
    if ("", "") in common:
        return "", ""
    return next(iter(common)) if len(common) == 1 else None


def match_paths(
    directory: Path, peft_paths: Iterable[str], model_paths: list[str], outside: Iterable[str] = ()
) -> dict[str, Place]:
    """Finds the model's linear map of each update: one map for an update, one update for a map, and for all updates the
    same components before the part of the path that is common. A path that is a map's own is for that map, even if it
    ends another's path.

    Args:
        directory: named in errors.
        peft_paths: those of the updates.
        model_paths: those of the model's linear maps.
        outside: those of linear maps outside of the model's layers, named in errors: a head whose weight is an
            embedding's, too, has the embedding's path in a graph.

    Raises:
        GraftError: there is none, or there are several.
    """
    best_of = {path: _best_places(path, model_paths) for path in peft_paths}
    for path, best in best_of.items():
        if not best:
            others = f" (outside of its layers it has {shown_paths(outside)})" if outside else ""
            raise GraftError(
                f"{directory}: the model has no linear map {path}{others}; PEFT adapters are matched by module path, "
                "and a weight that is tied to an embedding has the embedding's"
            )
    common = _common_prefixes(best_of.values())
    places: dict[str, Place] = {}
    owners: dict[str, str] = {}
    for path, best in best_of.items():
        if len(best) > 1 and common is not None:
            best = [place for place in best if (place.model_prefix, place.peft_prefix) == common]
        if len(best) > 1:
            raise GraftError(
                f"{directory}: {path} could be the model's {best[0].path} and its {best[1].path}; graft the part of "
                "the model that the adapter was trained on"
            )
        [place] = best
        if place.path in owners:
            raise GraftError(
                f"{directory}: {owners[place.path]} and {path} are both updates of the model's {place.path}; graft the "
                "whole model that the adapter was trained on"
            )
        owners[place.path] = path
        places[path] = place
    prefixes = {(place.model_prefix, place.peft_prefix): path for path, place in places.items()}
    if len(prefixes) > 1:
        one, other = [f"{path} (the model's {places[path].path})" for path in prefixes.values()][:2]
        raise GraftError(
            f"{directory}: {one} and {other} are of different parts; graft the whole model that the adapter was "
            "trained on"
        )
    return places
