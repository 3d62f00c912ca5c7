"""Models that move rows, or whose rows and tokens cannot be told apart, are refused: ids would be for other rows."""

import pytest
import torch
from torch import Tensor, nn

import torchgraft


def _encoder(batch_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class _Sorted(nn.Module):
    """Runs the longest rows first, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(20, 16), _encoder()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(descending=True)
        hidden = self.encoder(self.embedding(ids[order]), src_key_padding_mask=mask[order] == 0)
        return hidden[order.argsort()]


class _SortedStates(nn.Module):
    """Sorts hidden states by the lengths of another input, in two ways."""

    def __init__(self, selects: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.selects = selects

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), 2, 8).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort()
        y = x.index_select(0, order) if self.selects else x[order]
        kept = mask[order][:, None, None, :] > 0
        q, k, v = self.heads(self.q(y)), self.heads(self.k(y)), self.heads(self.v(y))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, kept)
        return (y + attended.transpose(1, 2).flatten(2))[order.argsort()]


class _Mixed(nn.Module):
    """Rows in another order by a product, of which the graph does not say what it does to rows."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _encoder()

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.eye(x.size(0)).flip(1)
        moved = torch.matmul(turned, x.flatten(1)).view(x.size(0), x.size(1), 16)
        return torch.matmul(turned, self.encoder(moved).flatten(1)).view(x.size(0), x.size(1), 16)


@pytest.mark.parametrize("form", ["traced", "scripted"])
def test_rows_sorted_by_length_are_refused(form: str) -> None:
    torch.manual_seed(0)
    model, ids = _Sorted().eval(), torch.randint(1, 20, (3, 5))
    mask = torch.ones_like(ids)
    base = torch.jit.script(model) if form == "scripted" else torch.jit.trace(model, (ids, mask), check_trace=False)
    with pytest.raises(torchgraft.GraftError, match=r"rows reach layer 0 in another order.*: aten::index.* moves rows"):
        torchgraft.graft(base, "lora[r=2]", "task")
    with pytest.raises(torchgraft.GraftError, match="rows reach layer 0 in another order"):
        torchgraft.AdapterPool(base, 2, ["lora[r=2]"])


@pytest.mark.parametrize("form", ["traced", "scripted"])
@pytest.mark.parametrize("selects", [False, True], ids=["index", "index_select"])
def test_states_sorted_by_another_input_are_refused(selects: bool, form: str) -> None:
    torch.manual_seed(0)
    model, example = _SortedStates(selects).eval(), (torch.randn(3, 5, 16), torch.ones(3, 5))
    base = torch.jit.script(model) if form == "scripted" else torch.jit.trace(model, example, check_trace=False)
    with pytest.raises(torchgraft.GraftError, match=r"rows reach layer 0 in another order.* moves rows"):
        torchgraft.graft(base, "lora[r=2]", "task")


def test_rows_moved_by_a_product_are_found_by_comparing_results() -> None:
    torch.manual_seed(0)
    base = torch.jit.script(_Mixed().eval())
    with pytest.raises(torchgraft.GraftError, match="to row 0 alone, the module changes the result of another row"):
        torchgraft.graft(base, "seq_bn[reduction_factor=4]", "task", example=(torch.randn(3, 5, 16),))


@pytest.mark.parametrize("batch_first", [True, False])
def test_as_many_tokens_as_rows_by_fixed_sizes_are_refused(batch_first: bool) -> None:
    model = _encoder(batch_first).eval()
    square = torchgraft.from_program(torch.export.export(model, (torch.randn(4, 4, 16),)))
    with pytest.raises(torchgraft.GraftError, match="as many tokens as rows by its fixed sizes.*trace or export"):
        torchgraft.graft(square, "lora[r=2]", "task")
    x = torch.randn(4, 5, 16)
    grafted = torchgraft.graft(torchgraft.from_program(torch.export.export(model, (x,))), "lora[r=2]", "task")
    with torch.no_grad():
        torch.testing.assert_close(grafted(x), model(x))
