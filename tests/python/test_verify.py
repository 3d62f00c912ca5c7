"""graft(verify=True) runs the base and the result on inputs, made up or given, and refuses what differs."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import torchgraft
from misread_layer import HIDDEN, Layer, inputs
from models import build

pytestmark = pytest.mark.quick


def _traced(layer: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.trace(layer.eval(), inputs(), check_trace=False)


def _graft(module: torch.jit.ScriptModule, **options: object) -> torch.jit.ScriptModule:
    return torchgraft.graft(module, config="lora", name="task", **options)


@pytest.fixture
def misread() -> torch.jit.ScriptModule:
    """A module that the patcher reads as another: its mask is taken back."""
    return torch.jit.script(Layer(undo=True).eval())


def test_a_misread_module_is_refused_with_inputs_made_up(misread: torch.jit.ScriptModule) -> None:
    with pytest.raises(torchgraft.GraftError, match=r"the result of adapter_ids = -1 differs from the base's by 0\."):
        _graft(misread)


@pytest.mark.parametrize("form", [tuple, lambda inputs: dict(zip(("x", "mask"), inputs, strict=True))])
def test_a_misread_module_is_refused_with_inputs_given(misread: torch.jit.ScriptModule, form: type) -> None:
    with pytest.raises(torchgraft.GraftError, match="differs from the base's by"):
        _graft(misread, example=form(inputs()))
    _graft(misread, example=form(inputs(padding=0)))  # nothing masked, nothing to see


def test_without_verify_nothing_runs(misread: torch.jit.ScriptModule) -> None:
    _graft(misread, verify=False)


def test_inputs_on_which_the_base_fails_are_an_error() -> None:
    with pytest.raises(torchgraft.GraftError, match="the base fails on the example inputs: "):
        _graft(_traced(Layer()), example=(torch.randn(3, 6, HIDDEN + 1), inputs()[1]))


def test_inputs_of_other_types_are_an_error_of_forward() -> None:
    with pytest.raises(RuntimeError, match="missing value for argument 'mask'"):
        _graft(_traced(Layer()), example=inputs()[0])


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return self.layer(x, mask)


class _ZeroesItsMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        result = self.layer(x, mask)
        mask.zero_()
        return result


class _Flag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor, mask: Tensor, times: int) -> Tensor:
        return self.layer(x, mask) * times


class _Prints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        print("seen")
        return self.layer(x, mask)


class _Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x, mask) + torch.zeros(1).uniform_()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (_Prints(), r"its forward has side effects \(prim::Print"),
        (_Noise(), r"its forward draws random numbers \(aten::uniform_"),
        (_Flag(), "what forward's argument 'times' takes is not known"),
    ],
)
def test_what_cannot_be_compared_is_said(module: nn.Module, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"the result was not compared with the base's: .*{reason}"):
        _graft(torch.jit.script(module.eval()))


def test_a_trace_of_training_is_not_compared() -> None:
    base = torch.jit.trace(Layer().train(), inputs(), check_trace=False)
    with pytest.warns(UserWarning, match=r"was not compared .* draws random numbers \(aten::dropout"):
        _graft(base)


def test_a_module_in_training_mode_is_compared_in_eval_mode() -> None:
    module = torch.jit.script(Layer(undo=True).train())
    with pytest.raises(torchgraft.GraftError, match="adapter_ids = -1 differs"):
        _graft(module)
    assert module.training
    assert module.dropout.training


def test_example_inputs_stand_in_for_what_is_not_known() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _graft(torch.jit.script(_Flag().eval()), example=(*inputs(), 2))


class _Remembers(nn.Module):
    """A forward whose result depends on the calls before: counters, a list, a dict, statistics."""

    seen: list[Tensor]
    last: dict[str, Tensor]
    growing: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.calls = Layer(), nn.BatchNorm1d(HIDDEN, momentum=0.5), 0
        self.seen, self.last, self.growing = [], {}, None
        self.norm.eps = 1e-3

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        before = self.last["x"] if "x" in self.last else torch.zeros_like(x)
        self.last["x"] = x
        growing = self.growing
        self.growing = x if growing is None else torch.cat([growing, x], 1)
        y = self.layer(x + before, mask) * float(self.calls) + float(len(self.seen))
        mean, variance = self.norm.running_mean, self.norm.running_var
        return nn.functional.batch_norm(y.transpose(1, 2), mean, variance, training=True, momentum=0.5)


def _state(module: torch.jit.ScriptModule) -> tuple[object, ...]:
    statistics = [tensor.clone() for tensor in (module.norm.running_mean, module.norm.running_var)]
    return (module.calls, len(module.seen), len(module.last), module.growing is None, statistics)


def test_nothing_is_left_of_a_run_in_a_module_that_remembers() -> None:
    module = torch.jit.script(_Remembers().eval())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="graft: forward assigns 'calls', 'growing'")
        grafted = _graft(module)
    for result in (module, grafted):
        calls, seen, last, is_empty, (mean, variance) = _state(result)
        assert (calls, seen, last, is_empty) == (0, 0, 0, True)
        assert torch.equal(mean, torch.zeros(HIDDEN))
        assert torch.equal(variance, torch.ones(HIDDEN))


def test_nothing_is_left_of_a_run_in_buffers_and_inputs() -> None:
    module = torch.jit.script(_Counts().eval())
    grafted = _graft(module, example=inputs())
    assert module.calls.item() == grafted.calls.item() == 0
    given = inputs()
    _graft(_traced(_ZeroesItsMask()), example=given)
    assert torch.equal(given[1], inputs()[1])


def test_a_run_draws_no_random_numbers() -> None:
    module = _traced(Layer())
    generator = torch.get_rng_state()
    torchgraft.graft(module, config="prefix_tuning", name="task", verify=False)
    drawn = torch.get_rng_state()
    torch.set_rng_state(generator)
    torchgraft.graft(module, config="prefix_tuning", name="task")
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_call_inside_autocast_compares_without_it() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _graft(torch.jit.script(Layer().eval()))
        assert torch.is_autocast_enabled("cpu")


class _Nested(nn.Module):
    """Rows that are no dimension of an input: choices of a question, in a list of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, inputs: list[dict[str, Tensor]]) -> Tensor:
        x = torch.stack([row["x"] for row in inputs]).flatten(0, 1)
        return self.layer(x, torch.ones(x.shape[:2])).sum(1)


class _OneRow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 5, 32)
        return self.layer(rows, torch.ones(rows.shape[:2])).sum(1)


def test_rows_are_looked_for_in_other_dimensions_and_else_said() -> None:
    inputs = [{"x": torch.randn(2, 5, HIDDEN)} for _ in range(3)]
    with pytest.warns(UserWarning, match="adapter_ids = -1 was not compared with the base: no size of the inputs"):
        _graft(torch.jit.script(_Nested().eval()), example=(inputs,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _graft(torch.jit.script(_OneRow().eval()), example=(torch.randn(5, HIDDEN),))


class _Router(nn.Module):
    """One of eight experts for each token: a step that 16 bits move."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.router = Layer(), nn.Linear(HIDDEN, 8)
        self.experts = nn.Parameter(torch.randn(8, HIDDEN, HIDDEN))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x, mask)
        return (y.unsqueeze(-2) @ self.experts[self.router(y).argmax(-1)]).squeeze(-2)


def test_a_step_that_rounding_moves_is_no_difference() -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        _graft(torch.jit.script(_Router().eval().bfloat16()))


class _HidesWords(nn.Module):
    def __init__(self, undo: bool) -> None:
        super().__init__()
        self.layer = Layer(undo)
        self.register_buffer("hidden", torch.arange(HIDDEN) % 3 == 0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x, mask).masked_fill(self.hidden, -1e9)


def test_filled_in_numbers_are_no_measure_for_the_rest() -> None:
    _graft(torch.jit.script(_HidesWords(undo=False).eval()))
    with pytest.raises(torchgraft.GraftError, match=r"adapter_ids = -1 differs from the base's by 0\."):
        _graft(torch.jit.script(_HidesWords(undo=True).eval()))


class _WordsAndMask(nn.Module):
    """Takes token ids and, if any, a mask of four dimensions; ids of 0 are padding."""

    def __init__(self, undo: bool) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(50, HIDDEN), Layer(undo)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        real = ids != 0
        if mask is not None:
            assert mask.dim() == 4
            real = real & (mask[:, 0, 0] >= 0)
        return self.layer(self.words(ids), real)


def test_padding_is_among_made_up_ids_and_masks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _graft(torch.jit.script(_WordsAndMask(undo=False).eval()))
    with pytest.raises(torchgraft.GraftError, match="adapter_ids = -1 differs"):
        _graft(torch.jit.script(_WordsAndMask(undo=True).eval()))


class _OddMask(_WordsAndMask):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None or mask.dim() == 7
        return self.layer(self.words(ids), ids != 0)


def test_a_mask_of_unknown_form_is_said() -> None:
    with pytest.warns(UserWarning, match="was compared with the base's without 'mask', whose form is not known"):
        _graft(torch.jit.script(_OddMask(undo=False).eval()))


def test_a_trace_is_run_with_its_own_shapes() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer = nn.Embedding(50, HIDDEN), Layer()

        def forward(self, ids: Tensor) -> Tensor:
            return self.layer(self.words(ids).view(3, 6, HIDDEN) + self.words.weight[:6], torch.ones(3, 6))

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _graft(torch.jit.trace(Constant().eval(), torch.randint(50, (3, 6))))


def test_the_second_graft_onto_a_frozen_base_is_in_eval_mode() -> None:
    frozen = torch.jit.freeze(torch.jit.script(Layer().eval()))
    grafted = _graft(frozen)
    assert not grafted.adapters.training
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torchgraft.graft(grafted, config="prefix_tuning", name="other")


@pytest.mark.parametrize("name", ["bert_sdpa", "own_pre_sdpa_bool", "own_post_packed_matmul", "encoder_script_post"])
def test_inputs_are_made_up_for_usual_models(name: str) -> None:
    module = build(name, torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compared.*")
        _graft(module)


@pytest.mark.parametrize("batch_first", [False, True])
def test_inputs_are_made_up_for_pytorch_s_transformer(batch_first: bool) -> None:
    module = nn.Transformer(HIDDEN, 4, 1, 1, 64, batch_first=batch_first)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compared.*")
        _graft(torch.jit.script(module.eval()))


def test_results_are_compared_where_the_executors_optimisation_is_off() -> None:
    """torch.jit's inliner then leaves the calls of callees."""

    class Inner(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(x, mask)

    modules = [torch.jit.script(Inner(Inner(Layer(undo=undo))).eval()) for undo in (False, True)]
    was_on = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            _graft(modules[0])
        with pytest.raises(torchgraft.GraftError, match=r"differs from the base's by 0\."):
            _graft(modules[1])
    finally:
        torch._C._set_graph_executor_optimize(was_on)


class _MaskedEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=mask)


def test_a_float_mask_that_torchs_fused_encoder_reads_as_flags_is_named() -> None:
    base, x, mask = torch.jit.script(_MaskedEncoder().eval()), torch.randn(2, 5, 16), torch.zeros(2, 5)
    mask[1, 3:] = -torch.inf
    torchgraft.graft(base, "lora", "task", example=(x, mask))
    mask[1, 3:] = -1.5
    with pytest.raises(torchgraft.GraftError, match="fused encoder layers, which hide every token whose float mask"):
        torchgraft.graft(base, "lora", "task", example=(x, mask))
