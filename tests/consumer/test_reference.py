"""docs/ops.md says what the libraries do: schemas, names and error messages are read from the page and tried."""

import re

import pytest
import torch

import torchgraft  # noqa: F401  registers the operators
from hosts_support import ROOT

PAGE = (ROOT / "docs" / "ops.md").read_text()
OPERATORS = torch.ops.torchgraft


def one_line(text: str) -> str:
    return " ".join(text.split())


def documented_schemas() -> list[str]:
    """The indented blocks of the page that are declarations: name(...) -> ..."""
    blocks = re.findall(r"(?:^    .+\n)+", PAGE, re.MULTILINE)
    return [one_line(block) for block in blocks if re.match(r"\w+\(Tensor ", block.strip())]


def registered_schemas() -> list[str]:
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("torchgraft::")]
    return [str(schema).removeprefix("torchgraft::") for schema in schemas]


def lora_arguments(**changes):
    """Arguments of gated_lora that fit together: B = 2, S = 3, I = 8, O = 6, r = 3, N = 1."""
    arguments = {
        "x": torch.randn(2, 3, 8),
        "base": torch.randn(2, 3, 6),
        "lora_a": torch.randn(1, 3, 8),
        "lora_b": torch.randn(1, 6, 3),
        "scaling": torch.ones(1),
    }
    return arguments | changes


@pytest.mark.quick
def test_every_schema_is_documented_as_registered():
    shortened = [schema.replace("=0.0", "=0.") for schema in documented_schemas()]  # torch prints 0.0 so
    assert sorted(shortened) == sorted(registered_schemas())


def test_every_non_linearity_is_documented():
    row = next(line for line in PAGE.splitlines() if line.startswith("| `non_linearity`"))
    documented = re.split(r", | or ", re.search(r"`f`: (.+), in any case", row)[1])
    hidden, bank = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    rest = [torch.zeros(1, 3), torch.zeros(1, 4, 3), torch.zeros(1, 4), torch.ones(1, 1)]
    with pytest.raises(RuntimeError) as raised:
        OPERATORS.gated_bottleneck(hidden, hidden, bank, *rest, "unheard_of")
    accepted = re.search(r"to be one of (.+), got", str(raised.value))[1].split(", ")
    assert sorted(documented) == sorted(accepted)
    for name in documented:
        OPERATORS.gated_bottleneck(hidden, hidden, bank, *rest, name.upper())


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_a": torch.randn(1, 3, 7)},
        {"lora_a": torch.randn(1, 3, 8, dtype=torch.float64)},
        {"gate_weight": torch.randn(1, 1, 8)},
        {"adapter": 3},
        {"adapter_ids": torch.tensor([0, 4])},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_errors_read_as_documented(changes):
    with pytest.raises(RuntimeError) as raised:
        OPERATORS.gated_lora(**lora_arguments(**changes))
    assert f"    {str(raised.value).splitlines()[0]}\n" in PAGE


def test_documented_errors_are_all_tried():
    assert len(re.findall(r"^    gated_lora: expected", PAGE, re.MULTILINE)) == 5


@pytest.mark.parametrize(("value", "real"), [(-1e4, False), (-9000.0, False), (float("-inf"), False), (-2e3, True)])
def test_token_mask_hides_what_the_page_says(value, real):
    mask = torch.tensor([[[[0.0, 0.0, value]]]])
    assert OPERATORS.attention_token_mask(torch.randn(2, 3, 8), mask).tolist() == [[True, True, real]] * 2


def test_floating_mask_has_a_gradient():
    query, prefix = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    mask = torch.zeros(1, 2, 3, 3, requires_grad=True)
    x, length = torch.randn(1, 3, 8), torch.tensor([5])
    arguments = (query, query, query, x, prefix, prefix, length)
    OPERATORS.gated_prefix_attention(*arguments, mask)[0].square().sum().backward()
    # The same from a softmax over prefix and sequence put together.
    keys = torch.cat([prefix, query], dim=2)
    other = torch.zeros_like(mask, requires_grad=True)
    scores = query @ keys.mT / 2 + torch.cat([torch.zeros(1, 2, 3, 5), other], dim=3)
    (scores.softmax(-1) @ keys).square().sum().backward()
    assert mask.grad.abs().max() > 0
    torch.testing.assert_close(mask.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_gate_and_base_rows_as_documented():
    gate_weight, gate_bias = torch.randn(1, 1, 8), torch.randn(1, 1)
    arguments = lora_arguments(
        gate_weight=gate_weight, gate_bias=gate_bias, adapter_ids=torch.tensor([0, -1]), scaling=torch.tensor([0.5])
    )
    output, gate = OPERATORS.gated_lora(**arguments)
    x, a, b = arguments["x"], arguments["lora_a"][0], arguments["lora_b"][0]
    expected_gate = torch.sigmoid(x[0] @ gate_weight[0].T + gate_bias[0]).mean()
    torch.testing.assert_close(gate, torch.tensor([[expected_gate], [0.0]]))
    torch.testing.assert_close(output[0], arguments["base"][0] + 0.5 * expected_gate * (x[0] @ a.T @ b.T))
    assert torch.equal(output[1], arguments["base"][1])
