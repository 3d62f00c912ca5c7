"""Cases drawn at random: a model family, a form of its module, and a directory that AdapterHub or PEFT has written.

A case is a seed and a number, and is the same whenever it is drawn. `outcome` runs it:

    .venv/bin/python tests/python/architectures/test_drawn_cases.py --cases 5000 --seed 7
    .venv/bin/python tests/python/architectures/test_drawn_cases.py --seed 7 --case 123
"""

import contextlib
import functools
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapters
import models
import oracle
import torchgraft
from hugging_face_models import FAMILIES, text_arguments
from whole_clip import CLIP

_FAMILIES = FAMILIES | {"clip": CLIP}
# Families by the attention that they are made with. "own": BERT, written by hand and scripted.
_EAGER = ("electra", "deberta", "deberta_v2", "deberta_v2_shared", "beit_relative", "gptj", "t5", "t5_gated", "clip")
_ATTENTIONS = dict.fromkeys(_FAMILIES, ("eager", "sdpa")) | dict.fromkeys(_EAGER, ("eager",))
_OWN = "own"
# With sdpa these give other results in the library for some prefixes; test_causal_prefixes.py has them.
_EAGER_LIBRARY = ("distilbert", "bart", "mbart", _OWN)
_FLOAT32_ONLY = ("clip_text", "clip")  # they write float64's lowest number into a float32 mask
FINE = ("equal", "refused: ", "warned: ", "library fails: ")  # how an outcome begins that is no bug
_TOLERANCE = 1e-5
_ROWS = (1, 2)  # seeds of the arguments: other sizes than those that were traced


@dataclass(frozen=True)
class DrawnCase:
    """family and attention: the model; form: "traced", "frozen" or "scripted"; library: "AdapterHub" or "PEFT"; config:
    the library's; safetensors: or a pickle."""

    seed: int
    number: int
    family: str
    attention: str
    form: str
    library: str
    config: Any
    safetensors: bool

    def command(self) -> str:
        return f"python tests/python/architectures/test_drawn_cases.py --seed {self.seed} --case {self.number}"

    def __str__(self) -> str:
        return f"{self.family} {self.attention} {self.form} {self.library} {self.config}"


def draw(seed: int, number: int) -> DrawnCase:
    rng = random.Random(f"{seed} {number}")
    family = rng.choice([*_FAMILIES, _OWN])
    attention = rng.choice(_ATTENTIONS[family]) if family != _OWN else "eager"
    form = "scripted" if family == _OWN else rng.choice(("traced", "traced", "frozen"))
    library = "PEFT" if family != _OWN and rng.random() < 0.35 else "AdapterHub"
    config = _draw_peft(rng, family) if library == "PEFT" else _draw_methods(rng)
    safetensors = rng.random() < 0.5 and (library == "PEFT" or not _has_prefix(config))
    return DrawnCase(seed, number, family, attention, form, library, config, safetensors)


def draw_method(seed: int, number: int, draw_config: Callable[[random.Random], adapters.AdapterConfig]) -> DrawnCase:
    """A family and a form as draw() gives them, with a configuration of AdapterHub that `draw_config` draws."""
    return replace(draw(seed, number), library="AdapterHub", config=draw_config(random.Random(f"{seed} {number}")))


def _has_prefix(config: adapters.AdapterConfig) -> bool:
    """With prefixes the library cannot write safetensors: "Some tensors share memory"."""
    parts = config.configs if isinstance(config, adapters.ConfigUnion) else [config]
    return any(isinstance(part, adapters.PrefixTuningConfig) for part in parts)


def _some(rng: random.Random, values: list, at_least: int = 1) -> list:
    return sorted(rng.sample(values, rng.randint(at_least, len(values))))


def _leave_out(rng: random.Random) -> list[int]:
    return rng.choice(([], [], [], [0], [1]))


def _draw_bottleneck(rng: random.Random) -> adapters.AdapterConfig:
    flag = functools.partial(rng.choice, (False, True))
    seldom = functools.partial(rng.choice, (False, False, False, True))
    phm = seldom()
    mh, output = rng.choice(((True, True), (True, False), (False, True), (False, True)))
    return adapters.BnConfig(
        mh_adapter=mh,
        output_adapter=output,
        reduction_factor=rng.choice((2, 16, 3.5, {"0": 4, "default": 12})) if not phm else rng.choice((2, 12)),
        non_linearity=rng.choice(("relu", "swish", "gelu", "tanh", "leakyrelu", "gelu_new", "quick_gelu")),
        original_ln_before=flag(),
        original_ln_after=not seldom(),
        ln_before=seldom(),
        ln_after=seldom(),
        is_parallel=flag(),
        scaling=rng.choice((1.0, 4.0, 0.3, "learned", "channel")),
        use_gating=flag(),
        residual_before_ln=rng.choice((True, True, False, "post_add")),
        adapter_residual_before_ln=seldom(),
        cross_adapter=seldom(),
        leave_out=_leave_out(rng),
        dropout=rng.choice((0.0, 0.2)),
        phm_layer=phm,
        phm_dim=2,
        shared_phm_rule=False,
        factorized_phm_W=flag(),
        factorized_phm_rule=seldom(),
        phm_bias=flag(),
        inv_adapter=rng.choice((None,) * 15 + ("nice",)),
    )


def _draw_prefix(rng: random.Random) -> adapters.AdapterConfig:
    flag = functools.partial(rng.choice, (False, True))
    return adapters.PrefixTuningConfig(
        encoder_prefix=rng.choice((True, True, False)),
        cross_prefix=rng.choice((True, True, False)),
        leave_out=_leave_out(rng),
        flat=flag(),
        prefix_length=rng.choice((1, 4, 11)),
        bottleneck_size=rng.choice((5, 20)),
        non_linearity=rng.choice(("tanh", "relu", "gelu")),
        use_gating=flag(),
        shared_gating=flag(),
    )


def _draw_lora(rng: random.Random) -> adapters.AdapterConfig:
    flag = functools.partial(rng.choice, (False, True))
    selfattn, intermediate, output = rng.choice(((True, False, False), (True, True, True), (False, True, False),
                                                 (False, False, True), (True, False, True)))  # fmt: skip
    scales = rng.random() < 0.2
    return adapters.LoRAConfig(
        selfattn_lora=selfattn,
        intermediate_lora=intermediate,
        output_lora=output,
        leave_out=_leave_out(rng),
        r=1 if scales else rng.choice((1, 3, 8)),
        alpha=rng.choice((1, 4, 8)),
        attn_matrices=_some(rng, ["q", "k", "v"]),
        composition_mode="scale" if scales else "add",
        init_weights="ia3" if scales else "lora",
        use_gating=flag(),
        use_dora=not scales and rng.random() < 0.2,
        dropout=0.0 if scales else rng.choice((0.0, 0.1)),
    )


def _draw_reft(rng: random.Random) -> adapters.AdapterConfig:
    flag = functools.partial(rng.choice, (False, True))
    return adapters.ReftConfig(
        layers=rng.choice(("all", "all", [0], [1])),
        prefix_positions=rng.choice((0, 1, 3)),
        suffix_positions=rng.choice((1, 2)),
        r=rng.choice((1, 3)),
        orthogonality=flag(),
        tied_weights=flag(),
        non_linearity=rng.choice((None, "relu", "gelu_new")),
    )


def _draw_methods(rng: random.Random) -> adapters.AdapterConfig:
    kinds = rng.sample((_draw_bottleneck, _draw_prefix, _draw_lora), rng.choice((1, 1, 2, 3)))
    methods = [kind(rng) for kind in kinds]
    if rng.random() < 0.25:
        methods = [_draw_reft(rng), *methods[1:]]
    return methods[0] if len(methods) == 1 else adapters.ConfigUnion(*methods)


@functools.cache
def _linear_names(family: str) -> list[str]:
    model = _FAMILIES[family].make(_ATTENTIONS[family][0], torch.float32).model
    return sorted({path.split(".")[-1] for path, module in model.named_modules()
                   if isinstance(module, nn.Linear | Conv1D)})  # fmt: skip


def _draw_peft(rng: random.Random, family: str) -> dict[str, Any]:
    names = _linear_names(family)
    targets = _some(rng, names)
    options = dict(
        r=rng.choice((1, 3, 8)),
        lora_alpha=rng.choice((1, 4, 16)),
        target_modules=rng.choice((targets, targets, "all-linear", rf".*\.({'|'.join(targets)})")),
        use_rslora=rng.random() < 0.2,
        use_dora=rng.random() < 0.2,
        lora_bias=rng.random() < 0.05,
        bias=rng.choice(("none",) * 15 + ("all",)),
        rank_pattern=rng.choice(({}, {}, {targets[0]: 2})),
        alpha_pattern=rng.choice(({}, {}, {targets[-1]: 5})),
        fan_in_fan_out=family == "gpt2",
    )
    if isinstance(options["target_modules"], list) and rng.random() < 0.2:
        options["layers_to_transform"] = [rng.choice((0, 1))]
    if rng.random() < 0.2:
        options["exclude_modules"] = [rng.choice(names)]
    return options


def _dtype(family: str) -> torch.dtype:
    return torch.float32 if family in _FLOAT32_ONLY else torch.float64


def _make(family: str, attention: str) -> nn.Module:
    return _FAMILIES[family].make(attention, _dtype(family))


def _arguments(family: str, seed: int) -> tuple:
    arguments = text_arguments if family == _OWN else _FAMILIES[family].arguments
    return arguments(_dtype(family), seed)


@functools.cache
def _base(family: str, attention: str, form: str) -> torch.jit.ScriptModule:
    if family == _OWN:
        return models.build("own_post_ids_matmul", torch.float64)
    traced = torch.jit.trace(_make(family, attention), _arguments(family, 0), check_trace=False, strict=False)
    return torch.jit.freeze(traced.eval()) if form == "frozen" else traced


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = models.hugging_face("bert", "eager", torch.float64)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, mask)[0]


@functools.cache
def _library(family: str, attention: str) -> nn.Module:
    """The library's model, unrepaired."""
    attention = "eager" if family in _EAGER_LIBRARY else attention
    model = _Own() if family == _OWN else _make(family, attention)
    adapters.init(model.model)
    return model


class LibraryError(Exception):
    """The library itself cannot run the case."""


@contextlib.contextmanager
def _written(case: DrawnCase, folder: str) -> Iterator[list[Tensor]]:
    """Writes the case's directory. Gives what the library computes, for each of _ROWS."""
    write = _written_by_peft if case.library == "PEFT" else _written_by_adapter_hub
    try:
        results = write(case, folder)
    except Exception as error:
        raise LibraryError(f"{type(error).__name__}: {error}") from error
    yield results


def _results(case: DrawnCase, model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        results = [model(*_arguments(case.family, seed)) for seed in _ROWS]
    if not all(bool(result.isfinite().all()) for result in results):
        raise ValueError("the result is not finite")
    return results


def _add_what_a_head_brings(model: nn.Module, folder: str) -> None:
    """Writes what all modules share (VeRA's matrices), which the library saves only from a model with a head."""
    if "task" not in model.shared_parameters:
        return
    path = next(Path(folder).glob("*adapter.*[ns]"))
    is_pickle = path.suffix == ".bin"
    state = torch.load(path, weights_only=True) if is_pickle else load_file(path)
    shared = {f"base.shared_parameters.task.{key}": value for key, value in model.shared_parameters["task"].items()}
    state |= {key: value.detach().clone() for key, value in shared.items()}
    torch.save(state, path) if is_pickle else save_file(state, path)


def _written_by_adapter_hub(case: DrawnCase, folder: str) -> list[Tensor]:
    positional = _library(case.family, case.attention)
    model = positional.model
    try:
        oracle.make_oracle_adapter(model, case.config, "task", case.number)
        model.eval().save_adapter(folder, "task", use_safetensors=case.safetensors)
        _add_what_a_head_brings(model, folder)
        model.set_active_adapters("task")
        return _results(case, positional)
    finally:
        model.set_active_adapters(None)
        if "task" in model.adapters_config:
            model.delete_adapter("task")
        model.base_model.prefix_tuning.prefix_counts.clear()  # of an adapter that could not be added


def _written_by_peft(case: DrawnCase, folder: str) -> list[Tensor]:
    positional = _make(case.family, case.attention)
    tuned = peft.get_peft_model(positional.model, peft.LoraConfig(**case.config))
    generator = torch.Generator().manual_seed(case.number)
    with torch.no_grad():
        for path, parameter in tuned.named_parameters():
            if "lora_" in path:
                steps = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(steps * 0.15 + ("magnitude" in path))
    tuned.to(_dtype(case.family)).eval().save_pretrained(folder, safe_serialization=case.safetensors)
    return _results(case, positional)


def outcome(case: DrawnCase) -> str:
    """Returns "equal"; "refused: why"; "warned: of what", where the results differ; or "library fails: why". Any other
    text is a bug."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _written(case, folder) as expected:
                return _compared(case, folder, expected)
        except LibraryError as error:
            return f"library fails: {error}"


def check_many_are_equal(cases: list[DrawnCase]) -> None:
    """What is refused, or fails in the library, proves little."""
    found = [outcome(case) for case in cases]
    assert found.count("equal") >= len(found) // 3, found


def _compared(case: DrawnCase, folder: str, expected: list[Tensor]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            grafted = torchgraft.load_adapter(_base(case.family, case.attention, case.form), folder, "task")
        except torchgraft.GraftError as error:
            return "refused: " + str(error).replace(folder, "DIR")
    try:
        with torch.no_grad():
            results = [grafted(*_arguments(case.family, seed)) for seed in _ROWS]
    except Exception as error:
        return f"raises at run time: {type(error).__name__}: {error}"
    results = [result[0] if isinstance(result, tuple) else result for result in results]
    found = max(oracle.difference(a, b) for a, b in zip(results, expected, strict=True))
    if found <= _TOLERANCE:
        return "equal"
    texts = [str(each.message) for each in caught]
    said = [text.replace(folder, "DIR") for text in texts if text.startswith((folder, "graft: in layer"))]
    return f"warned: {said[0]}" if said else f"differs by {found:.2g}"
