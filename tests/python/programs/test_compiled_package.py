"""AOTInductor packages: equal to the module, described, and with adapters swapped in place."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import torchgraft
from grafted import grafted
from oracle import difference
from scripts_here import run_here
from small import HIDDEN, Encoder, randomised
from torchgraft.programs.bank_constants import banks_read, computed_from_banks
from torchgraft.programs.to_script import input_ranges


def load(path: Path):
    return torch._inductor.aoti_load_package(str(path))


def _model() -> tuple[torch.jit.ScriptModule, Tensor]:
    """A layer with two LoRAs, "first" and "second", all of whose weights are random, and an example."""
    torch.manual_seed(0)
    example = torch.randn(2, 5, HIDDEN)
    module = torch.jit.trace(Encoder().eval(), example)
    config = torchgraft.LoRAConfig(r=3, use_gating=True)
    for name in ("first", "second"):
        module = torchgraft.graft(module, config, name)
    return randomised(module), example


def test_a_package_lists_and_swaps_its_adapters(tmp_path: Path) -> None:
    module, example = _model()
    module.save(str(tmp_path / "model.pt"))
    torch.save(example, tmp_path / "example.pt")
    out = tmp_path / "out.pt2"
    options = ["--aoti", out, "--gates", "--example", tmp_path / "example.pt"]
    done = run_here("graft.py", "export", tmp_path / "model.pt", *options)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    of_package, of_module = (run_here("graft.py", "list", path) for path in (out, tmp_path / "model.pt"))
    assert (of_package.returncode, of_package.stdout) == (0, of_module.stdout)
    package, ids, x = load(out), torch.tensor([1, 0, -1]), torch.randn(3, 7, example.size(-1))
    other = torchgraft.replace_adapter(module, "second", torchgraft.LoRAConfig(r=3, use_gating=True))
    randomised(other, seed=1)
    other.adapters.layer_0.selfattn_lora_q.scaling.copy_(torch.tensor([0.5, 3.0]))  # few numbers: no part of the code
    with torch.no_grad():
        before, after = module.forward_with_gates(x, ids), other(x, ids)
        assert difference(before[0], after) > 0.1
        result, gates = package(x, ids)
        assert difference(result, before[0]) <= 1e-5
        assert difference(gates["layer_0.selfattn_lora"][1:2], before[1]["first"][0]["selfattn_lora"]) <= 1e-6
        torchgraft.load_banks(package, other, like=module)
        assert difference(package(x, ids)[0], after) <= 1e-5
        wider = torchgraft.replace_adapter(module, "second", torchgraft.LoRAConfig(r=4, use_gating=True))
        with pytest.raises(torchgraft.GraftError, match=r"as float32 \[2, 16, 3\], .* got float32 \[2, 16, 4\]"):
            torchgraft.load_banks(package, wider, like=module)
        assert difference(package(x, ids)[0], after) <= 1e-5
        # A pool: the package reads tensors of the caller, whose rows are written in place.
        names = [name for name in package.get_constant_fqns() if name.startswith("adapters.")]
        banks = {name: other.state_dict()[name].clone() for name in names}
        package.load_constants(banks, check_full_update=False, user_managed=True)
        assert difference(package(x, ids)[0], after) <= 1e-5
        for name, bank in banks.items():
            bank.copy_(module.state_dict()[name])
        assert difference(package(x, ids)[0], before[0]) <= 1e-5


class _Package:
    """What load_banks() uses of a package: the names of its constants, and what they become."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        self.names = [name for name in module.state_dict() if name.startswith("adapters.")]
        self.written: dict[str, Tensor] = {}

    def get_constant_fqns(self) -> list[str]:
        return self.names

    def load_constants(self, constants: dict[str, Tensor], check_full_update: bool) -> None:
        self.written = constants


@pytest.mark.quick
def test_what_a_package_does_not_have_must_stay() -> None:
    """A compiler may have written a tensor of few numbers into the code."""
    module, _ = _model()
    other, _ = _model()
    package = _Package(module)
    name = "adapters.layer_0.selfattn_lora_q.scaling"
    package.names.remove(name)
    torchgraft.load_banks(package, other, like=module)
    assert sorted(package.written) == sorted(package.names)
    other.state_dict()[name].mul_(2)
    package.written = {}
    with pytest.raises(torchgraft.GraftError, match=f"'{name}' has changed, and the package does not have it"):
        torchgraft.load_banks(package, other, like=module)
    assert package.written == {}


@pytest.mark.quick
def test_one_tensor_as_two_inputs_of_the_example() -> None:
    class Two(torch.nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left - 2 * right

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    program = torchgraft.export(torch.jit.trace(Two(), (x, y)), (x, x))
    assert difference(program.module()(x, y), x - 2 * y) <= 1e-6


@pytest.mark.quick
def test_the_program_of_a_pool(tmp_path: Path) -> None:
    """It takes rows' numbers, computes what the pool's module computes, and says what the pool is like."""
    torch.manual_seed(0)
    example = torch.randn(2, 5, HIDDEN)
    base = torch.jit.trace(Encoder().eval(), example)
    torchgraft.save_adapter(randomised(torchgraft.graft(base, "unipelt", "a")), "a", tmp_path / "a")
    pool = torchgraft.AdapterPool(base, 3, ["unipelt", "lora[r=2]"], max_compositions=0)
    pool.insert("a", tmp_path / "a")
    lease = pool.acquire(["a", "", "a"])
    program = torchgraft.export(pool, example)
    x = torch.randn(3, 7, HIDDEN)
    with torch.no_grad():
        assert difference(program.module()(x, lease.ids), lease.module(x, adapter_ids=lease.ids)) <= 1e-6
        assert difference(program.module()(x, lease.ids), base(x)) > 0.1
    description = program.graph_module.meta["custom"]["torchgraft"]
    assert description["adapters"] == [] and description["pool"]["capacity"] == 3
    again = torchgraft.AdapterPool(base, 3, description["pool"]["room"], max_compositions=0)
    shapes = [
        {name: tensor.shape for name, tensor in each.acquire([]).module.state_dict().items()} for each in (pool, again)
    ]
    assert shapes[0] == shapes[1]
    assert set(banks_read(program)) <= set(shapes[0]) and computed_from_banks(program) is None
    sizes = input_ranges(program)
    assert [each["name"] for each in sizes] == ["x", "adapter_ids"] and sizes[0]["sizes"][2] == [HIDDEN, HIDDEN]
    assert sizes[0]["sizes"][0][1] is None
    for options in ({"gates": True}, {"adapter_ids": False}, {"lowered": True}):
        with pytest.raises(torchgraft.GraftError, match="the program of a pool takes adapter_ids"):
            torchgraft.export(pool, example, **options)
    with pytest.raises(torchgraft.GraftError, match="has no banks yet"):
        torchgraft.export(torchgraft.AdapterPool(base, 3), example)


@pytest.mark.quick
def test_gates_over_other_tokens_are_no_change_of_banks() -> None:
    """The banks have one size; the code of the package has the pooling, but where it is data."""
    whole, real = (grafted("bert_sdpa", torch.float32, "unipelt", pooling) for pooling in ("all", "unpadded"))
    for old, new, found in ((whole, real, "unpadded"), (real, whole, "all")):
        package = _Package(old)
        with pytest.raises(torchgraft.GraftError, match=rf"got 'task' \(gates over {found} tokens\); make a package"):
            torchgraft.load_banks(package, new, like=old)
        assert package.written == {}
        torchgraft.load_banks(package, old, like=old)
        assert sorted(package.written) == sorted(package.names)
    one = torchgraft.graft(whole, "unipelt", "other", gate_pooling="unpadded")
    two = torchgraft.graft(real, "unipelt", "other", gate_pooling="all")
    package = _Package(one)
    torchgraft.load_banks(package, two, like=one)
    assert package.written["adapters.pools_all"].tolist() == two.adapters.pools_all.tolist() == [False, True, True]


def test_what_cannot_be_compiled_leaves_nothing(tmp_path: Path) -> None:
    module, example = _model()
    program = torchgraft.export(module, example)
    with pytest.raises(torchgraft.GraftError, match="expected a file ending in .pt2, got 'out.so'"):
        torchgraft.compile_package(program, "out.so")
    with pytest.raises(torchgraft.GraftError, match="does not exist"):
        torchgraft.compile_package(program, tmp_path / "none" / "out.pt2")
    assert list(tmp_path.iterdir()) == []
