"""The ground that the parity tests stand on: bases equal the oracle's base, and the oracle's adapters do something."""

import pytest
import torch

import models
from models import VARIANTS
from oracle import CONFIGS, TOLERANCE, adapter_parameters, difference, oracle, oracle_for, runs_on, varied_batches

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_base_equals_the_oracle_without_adapter(name, dtype):
    variant = VARIANTS[name]
    base = models.base(name, dtype)
    for batch in varied_batches(variant, dtype):
        with torch.no_grad():
            hidden = variant.hidden(base(*variant.arguments(batch)))
        expected = oracle_for(variant, dtype).run(variant, batch, None)
        assert hidden.dtype == dtype
        found = difference(variant.compared(hidden, batch), variant.compared(expected.hidden, batch))
        assert found <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("config", "family"), [(c, f) for c in CONFIGS for f in ("bert", "distilbert", "vit") if runs_on(c, f)]
)
def test_oracle_adapter_is_far_from_neutral(config, family):
    """A parity test proves nothing about a parameter that is zero, or about gates that are all alike."""
    variant = next(variant for variant in VARIANTS.values() if variant.family == family)
    library = oracle(family, variant.attention, torch.float64)
    saved = library.adapter(config)
    batch = varied_batches(variant, torch.float64)[0]
    result = library.run(variant, batch, saved)
    assert difference(result.hidden, library.run(variant, batch, None).hidden) > 0.1
    for path, parameter in adapter_parameters(library.model, saved.name):
        assert parameter.dtype == torch.float64 and bool((parameter != 0).all()), path
    strongest: dict[str, float] = {}  # by location: a single layer's gate may come out near 0.5
    for locations in result.gates.values():
        for location, gate in locations.items():
            strongest[location] = max(strongest.get(location, 0.0), (gate - 0.5).abs().max().item())
            assert gate.dim() == 2 and gate.size(0) == batch.rows, location
            assert difference(gate[0], gate[1]) > 1e-4, f"{location}: the gate does not depend on its input"
    assert all(value > 0.1 for value in strongest.values()), strongest


def test_gates_have_one_column_per_gate():
    """Squeezing is undone for a single row, where it is ambiguous."""
    variant = VARIANTS["bert_sdpa"]
    library = oracle_for(variant, torch.float64)
    for rows in (1, 2):
        batch = models.make_batch([6] * rows, 6, torch.float64)
        gates = library.run(variant, batch, library.adapter("union_everything")).gates
        widths = {location: tuple(gate.shape) for location, gate in gates[0].items()}
        assert widths == {
            "self_prefix": (rows, 2),
            "selfattn_lora": (rows, 3),
            "mh_adapter": (rows, 1),
            "intermediate_lora": (rows, 1),
            "output_lora": (rows, 1),
            "output_adapter": (rows, 1),
        }
        assert "output_adapter" not in gates[1]  # left out


def test_vit_lora_gates_are_in_the_order_q_k_v():
    """With the query's gate alone set to one, its column is the first."""
    variant = VARIANTS["own_pre_matmul"]
    library = oracle_for(variant, torch.float64)
    saved = library.adapter("lora_all_gated", seed=5)
    loras = library.model.encoder.layer[0].attention.attention.query.loras
    with torch.no_grad():
        loras[saved.name].gate.bias.fill_(1e3)
    gates = library.run(variant, models.make_batch([6, 3], 6, torch.float64), saved).gates[0]["selfattn_lora"]
    assert torch.equal(gates[:, 0], torch.ones(2, dtype=torch.float64))
    assert bool((gates[:, 1:] < 0.99).all())
