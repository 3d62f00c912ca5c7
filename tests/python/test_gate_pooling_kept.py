"""The gate_pooling of an adapter goes with it: into its directory, its row of a bank, a pool, and what is printed."""

import json
from pathlib import Path

import pytest
import torch

import torchgraft
from grafted import base, grafted, saved_adapter
from models import VARIANTS, make_batch
from oracle import TOLERANCE, difference, oracle_for
from scripts_here import run_here

_POOLINGS = ("all", "unpadded")
_BATCH = make_batch([9, 5, 7], 9, torch.float64)
_CONFIG = "union_everything"


def _hidden(name: str, module: torch.jit.ScriptModule, **named: torch.Tensor) -> torch.Tensor:
    variant = VARIANTS[name]
    with torch.no_grad():
        return variant.compared(variant.hidden(module(*variant.arguments(_BATCH), **named)), _BATCH)


def _rows(name: str, module: torch.jit.ScriptModule, **named: torch.Tensor) -> torch.Tensor:
    variant = VARIANTS[name]
    with torch.no_grad():
        return variant.hidden(module(*variant.arguments(_BATCH), **named))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights, of an adapter of each pooling."""
    folder = tmp_path_factory.mktemp("poolings")
    for pooling in _POOLINGS:
        torchgraft.save_adapter(grafted("bert_sdpa", torch.float64, _CONFIG, pooling), "task", folder / pooling)
    return {pooling: folder / pooling for pooling in _POOLINGS}


@pytest.mark.quick
@pytest.mark.parametrize("pooling", _POOLINGS)
@pytest.mark.parametrize("safetensors", [True, False])
def test_a_directory_keeps_it(pooling: str, safetensors: bool, tmp_path: Path) -> None:
    module = grafted("bert_sdpa", torch.float64, "unipelt", pooling)
    torchgraft.save_adapter(module, "task", tmp_path, safetensors=safetensors)
    again = torchgraft.load_adapter(base("bert_sdpa", torch.float64), tmp_path)
    assert [info.gate_pooling for info in torchgraft.list_adapters(again)] == [pooling]
    assert difference(_hidden("bert_sdpa", again), _hidden("bert_sdpa", module)) <= 1e-12
    other = grafted("bert_sdpa", torch.float64, "unipelt", next(each for each in _POOLINGS if each != pooling))
    assert difference(_hidden("bert_sdpa", again), _hidden("bert_sdpa", other)) > 1e-3


def test_the_library_reads_over_it(directories: dict[str, Path]) -> None:
    """Live: AdapterHub ignores "unpadded" in a directory and pools over all tokens."""
    assert json.loads((directories["unpadded"] / "adapter_config.json").read_text())["gate_pooling"] == "unpadded"
    variant = VARIANTS["bert_sdpa"]
    oracle = oracle_for(variant, torch.float64)
    results = []
    for directory in directories.values():
        name = oracle.model.load_adapter(str(directory), use_safetensors=True, load_as=f"read_{directory.name}")
        oracle.model.to(torch.float64).eval()
        with torch.no_grad():
            oracle.model.set_active_adapters(name)
            results.append(oracle.model(_BATCH.ids, _BATCH.mask)[0])
        oracle.model.delete_adapter(name)
    assert torch.equal(*results)
    expected = _rows("bert_sdpa", grafted("bert_sdpa", torch.float64, _CONFIG))
    assert difference(results[0], expected) <= TOLERANCE[torch.float32]  # the library makes adapters in float32


def test_a_directory_of_the_library_means_all(tmp_path: Path) -> None:
    directory = Path(saved_adapter(VARIANTS["bert_sdpa"], torch.float64, "unipelt").directory)
    assert "gate_pooling" not in json.loads((directory / "adapter_config.json").read_text())
    module = torchgraft.graft(base("bert_sdpa", torch.float64), adapters={"task": directory})
    assert torchgraft.list_adapters(module)[0].gate_pooling == "all"


@pytest.mark.parametrize(
    ("name", "token_mask"),
    [
        ("bert_sdpa", None),
        pytest.param("bert_sdpa", "attention_mask", marks=pytest.mark.slow(seconds=4)),
        pytest.param("own_post_packed_matmul", None, marks=pytest.mark.slow(seconds=4)),
        ("encoder_slow_post_seq_first", None),
    ],
)
def test_rows_of_both_poolings_share_a_batch(name: str, token_mask: str | None) -> None:
    """Each row is what its adapter gives alone, and so is the whole batch without ids."""
    saved = saved_adapter(VARIANTS[name], torch.float64, _CONFIG)
    module = torchgraft.graft(base(name, torch.float64), adapters={"all": saved.directory}, gate_pooling="all")
    module = torchgraft.graft(
        module, adapters={"unpadded": saved.directory}, gate_pooling="unpadded", token_mask=token_mask
    )
    module = torchgraft.graft(module, "lora", "ungated")
    alone = [_rows(name, grafted(name, torch.float64, _CONFIG, pooling)) for pooling in _POOLINGS]
    alone.append(_rows(name, base(name, torch.float64)))
    assert difference(alone[0], alone[1]) > 1e-3
    for each in (module, torchgraft.lower(module)):
        for ids in ([0, 1, -1], [1, -1, 0], [-1, 0, 1], [1, 1, 1]):
            rows = _rows(name, each, adapter_ids=torch.tensor(ids))
            for row, number in enumerate(ids):
                length = int(_BATCH.mask[row].sum())
                assert difference(rows[row, :length], alone[number][row, :length]) <= 1e-12, (ids, row)
        for number, pooling in enumerate(_POOLINGS):
            each.activate(pooling)
            assert difference(_hidden(name, each), VARIANTS[name].compared(alone[number], _BATCH)) <= 1e-12


def test_wrong_ids_are_refused_where_poolings_are_mixed() -> None:
    module = torchgraft.graft(base("bert_sdpa", torch.float64), "unipelt", "a")
    module = torchgraft.graft(module, "unipelt", "b", gate_pooling="unpadded")
    arguments = VARIANTS["bert_sdpa"].arguments(_BATCH)
    for ids in ([0, 1], [[0, 1, 1]], [0, 1, 2], [0, -2, 1], [0.0, 1.0, 1.0]):
        with pytest.raises((RuntimeError, torch.jit.Error), match="expected adapter_ids"):
            module(*arguments, adapter_ids=torch.tensor(ids))


def test_a_pool_mixes_them(directories: dict[str, Path]) -> None:
    pool = torchgraft.AdapterPool(base("bert_sdpa", torch.float64), capacity=3)
    for pooling in _POOLINGS:  # the second needs banks of both kinds
        pool.insert(pooling, directories[pooling])
    assert pool.stats()["rebuilds"] == 2
    with pool.acquire(["unpadded", "all", ""]) as lease:
        rows = _rows("bert_sdpa", lease.module, adapter_ids=lease.ids)
    alone = {
        pooling: _rows("bert_sdpa", grafted("bert_sdpa", torch.float64, _CONFIG, pooling)) for pooling in _POOLINGS
    }
    for row, pooling in enumerate(["unpadded", "all"]):
        assert difference(rows[row], alone[pooling][row]) <= 1e-12
    pool.insert("all", directories["unpadded"])  # the row's flag goes with what is in it
    with pool.acquire(["", "all", ""]) as lease:
        assert difference(_rows("bert_sdpa", lease.module, adapter_ids=lease.ids)[1], alone["unpadded"][1]) <= 1e-12


def test_whoever_asks_for_another_one_is_told(directories: dict[str, Path]) -> None:
    module = base("bert_sdpa", torch.float64)
    for pooling in _POOLINGS:
        other = next(each for each in _POOLINGS if each != pooling)
        message = f"'task' was trained with gates over {pooling} tokens"
        with pytest.warns(UserWarning, match=message):
            changed = torchgraft.graft(module, adapters={"task": directories[pooling]}, gate_pooling=other)
        assert torchgraft.list_adapters(changed)[0].gate_pooling == other
        expected = grafted("bert_sdpa", torch.float64, _CONFIG, other)
        assert difference(_hidden("bert_sdpa", changed), _hidden("bert_sdpa", expected)) <= 1e-12
        with pytest.warns(UserWarning, match=message):
            torchgraft.AdapterPool(module, gate_pooling=other).insert("task", directories[pooling])
        kept = torchgraft.graft(module, adapters={"task": directories[pooling]})
        with pytest.raises(torchgraft.GraftError, match=f"of 'task', .* means over \"{pooling}\" tokens; leave"):
            torchgraft.AdapterPool(kept, gate_pooling=other)
    both = torchgraft.graft(module, adapters={each: directories[each] for each in _POOLINGS})
    with pytest.raises(torchgraft.GraftError, match="different configurations"):
        torchgraft.average_adapter(both, "mean", _POOLINGS)


def test_a_wrong_one_in_a_directory_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    for value, message in (("some", 'expected gate_pooling "all" or "unpadded", got "some"'), (3, "a string, got 3")):
        for file in directories["all"].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"gate_pooling": value}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(torchgraft.GraftError, match=message):
            torchgraft.load_adapter(base("bert_sdpa", torch.float64), tmp_path)


def test_the_command_line_keeps_and_shows_it(directories: dict[str, Path], tmp_path: Path) -> None:
    base("bert_sdpa", torch.float64).save(tmp_path / "base.pt")

    def graft_py(*arguments: object) -> str:
        done = run_here("graft.py", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    graft_py("load", tmp_path / "base.pt", directories["unpadded"], "-o", tmp_path / "one.pt")
    graft_py("load", tmp_path / "one.pt", directories["all"], "--name", "other", "-o", tmp_path / "two.pt")
    listed = graft_py("list", tmp_path / "two.pt")
    assert "unpadded tokens" in listed and "all tokens" in listed
    assert "gates over unpadded tokens: task" in graft_py("inspect", tmp_path / "two.pt")
    graft_py("save", tmp_path / "two.pt", "task", tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["gate_pooling"] == "unpadded"


_OF_BEFORE = Path(__file__).parent / "files" / "gates_of_before.pt"


def test_a_file_of_before_keeps_what_its_gates_read() -> None:
    """Of the version whose files have one gate_pooling for all adapters: "unpadded", of the attention's own mask.
    forward(x, mask, other): LoRA of rank 1 at q and v of one attention of size 8."""
    module = torch.jit.load(_OF_BEFORE)
    assert module.adapters.gate_pooling == "unpadded" and "gate_pooling" not in module.adapters.configs[0]
    assert [info.gate_pooling for info in torchgraft.list_adapters(module)] == ["unpadded"]
    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    arguments = (x, mask, torch.ones_like(mask))
    expected = []
    for place in ("selfattn_lora_q", "selfattn_lora_v"):
        slot = getattr(module.adapters.layer_0, place)
        gates = torch.sigmoid(x @ slot.gate_weight[0, 0] + slot.gate_bias[0, 0])
        expected.append((gates * mask).sum(1) / mask.sum(1))
    for token_mask in ("mask", "other"):
        with pytest.raises(torchgraft.GraftError, match="the module's token mask is each attention's own"):
            torchgraft.graft(module, "lora[use_gating=True]", "more", gate_pooling="unpadded", token_mask=token_mask)
    both = torchgraft.graft(
        module, "lora[use_gating=True]", "more", gate_pooling="unpadded", active="task", verify=False
    )
    with torch.no_grad():
        for each in (module, both):
            gates = each.forward_with_gates(*arguments)[1]["task"][0]["selfattn_lora"]
            torch.testing.assert_close(gates, torch.stack(expected, 1), rtol=0, atol=1e-6)
        assert torch.equal(both(*arguments), module(*arguments))


class _SeesWhatItIsTold(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (torch.nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.view(x.size(0), x.size(1), 4, 8).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible.unsqueeze(1))
        return x + self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("lowered", [False, True])
def test_a_mask_that_cannot_be_read_hinders_only_rows_that_need_it(dtype: torch.dtype, lowered: bool) -> None:
    torch.manual_seed(0)
    eager = _SeesWhatItIsTold().double().eval()
    groups = torch.tensor([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0], [1, 2, 2, 2, 1]])  # 0: padding, which nobody sees
    visible = (groups[:, :, None] == groups[:, None, :]) & (groups != 0)[:, None, :] | torch.eye(5, dtype=torch.bool)
    if dtype != torch.bool:
        visible = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, float("-inf"))
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    plain = torch.jit.trace(eager, (x, visible))
    module = torchgraft.graft(plain, "lora[use_gating=True]", "all", example=(x, visible))
    module = torchgraft.graft(module, "lora[use_gating=True]", "unpadded", gate_pooling="unpadded", verify=False)
    for key, parameter in module.adapters.named_parameters():
        if key.endswith("lora_b"):
            parameter.data.normal_()
    alone = torchgraft.remove_adapter(module, "unpadded")
    alone.activate("all")
    unpadded = torchgraft.remove_adapter(module, "all")
    module = torchgraft.lower(module, verify=False) if lowered else module
    with torch.no_grad():
        rows = module(x, visible, adapter_ids=torch.tensor([0, 1, -1]))
        expected = [alone(x, visible)[0], unpadded(x[1:2], visible[1:2])[0], eager(x, visible)[2]]
        torch.testing.assert_close(rows, torch.stack(expected))
        module.activate("all")
        torch.testing.assert_close(module(x, visible), alone(x, visible))
        for ids in ([1, 1, -1], [0, 1, 1]):
            with pytest.raises((RuntimeError, torch.jit.Error), match="cannot be told from its attention mask"):
                module(x, visible, adapter_ids=torch.tensor(ids))
