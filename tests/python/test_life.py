"""What happens to modules around grafting: the source, saving and loading, activation, a second graft, training."""

import io
import json
import subprocess
import sys
import threading

import pytest
import torch

import torchgraft
from grafted import base, grafted, saved_adapter
from models import VARIANTS, build, make_batch
from oracle import difference

pytestmark = pytest.mark.quick

_NAMES = ["bert_sdpa", "own_post_packed_matmul", "encoder_script_post", "encoder_fast_post_nested"]
FLOAT = torch.float32


def _arguments(name: str, lengths=(9, 6)) -> tuple:
    return VARIANTS[name].arguments(make_batch(list(lengths), max(lengths), FLOAT))


def _tensors(result) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))


def _saved_copy(module: torch.jit.ScriptModule) -> io.BytesIO:
    return io.BytesIO(module.save_to_buffer())


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("has_run", [False, True])
def test_the_source_is_unchanged(name: str, has_run: bool) -> None:
    module = build(name, FLOAT)
    arguments = _arguments(name)
    with torch.no_grad():
        if has_run:
            for _ in range(3):  # past profiling
                module(*arguments)
        graph, code = str(module.graph), str(module.code)
        state = {key: value.clone() for key, value in module.state_dict().items()}
        before = module(*arguments)
        torchgraft.graft(module, config="unipelt", name="task")
        assert str(module.graph) == graph and str(module.code) == code
        assert module.state_dict().keys() == state.keys()
        assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())
        assert _same(module(*arguments), before)
        assert not hasattr(module, "adapters")


@pytest.mark.parametrize("name", _NAMES)
def test_deactivated_it_is_the_base_bit_for_bit(name: str) -> None:
    module = torchgraft.graft(base(name, FLOAT), config="unipelt", name="task")
    arguments = _arguments(name)
    with torch.no_grad():
        expected = base(name, FLOAT)(*arguments)
        assert module.active_adapter() == "task"
        assert not _same(module(*arguments), expected)
        module.deactivate()
        assert module.active_adapter() is None
        assert _same(module(*arguments), expected)
        assert _same(module.base_forward(*arguments), expected)
        module.activate("task")
        assert not _same(module(*arguments), expected)


# Attention that is written out is computed by another kernel once grafted, so float32 rounding alone moves it by 2e-6
# on these steep random weights: it is compared in float64.
@pytest.mark.parametrize("config", ["lora", "par_bn"])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("bert_sdpa", FLOAT, 1e-5),
        ("own_pre_sdpa_bool", FLOAT, 1e-5),
        ("encoder_slow_post_seq_first", FLOAT, 1e-5),
        ("bert_eager", torch.float64, 1e-12),
        ("own_post_packed_matmul", torch.float64, 1e-12),
    ],
)
def test_fresh_lora_and_parallel_bottleneck_change_nothing(name, dtype, tolerance, config) -> None:
    module = torchgraft.graft(base(name, dtype), config=config, name="task")
    arguments = VARIANTS[name].arguments(make_batch([9, 6], 9, dtype))
    with torch.no_grad():
        for actual, expected in zip(_tensors(module(*arguments)), _tensors(base(name, dtype)(*arguments)), strict=True):
            assert difference(actual, expected) <= tolerance


@pytest.mark.parametrize("name", _NAMES)
def test_saving_and_loading_changes_nothing(name: str, tmp_path) -> None:
    module = grafted(name, FLOAT, "union_everything")
    path = str(tmp_path / "module.pt")
    module.save(path)
    loaded = torch.jit.load(path)
    arguments = _arguments(name)
    with torch.no_grad():
        assert _same(loaded(*arguments), module(*arguments))
        first, second = module.forward_with_gates(*arguments)[1], loaded.forward_with_gates(*arguments)[1]
    assert str(first) == str(second)
    assert loaded.adapter_names() == ["task"] and loaded.active_adapter() == "task"


def test_a_fresh_process_needs_the_operator_library_only(tmp_path) -> None:
    module = grafted("bert_sdpa", FLOAT, "unipelt")
    arguments = _arguments("bert_sdpa")
    module.save(str(tmp_path / "module.pt"))
    torch.save(list(arguments), tmp_path / "arguments.pt")
    program = f"""
import sys, torch
torch.set_num_threads(1)
torch.ops.load_library({str(torchgraft.library_path())!r})
module = torch.jit.load({str(tmp_path / "module.pt")!r})
with torch.no_grad():
    result = module(*torch.load({str(tmp_path / "arguments.pt")!r}))
torch.save(result[0], {str(tmp_path / "result.pt")!r})
assert "torchgraft" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "result.pt"), module(*arguments)[0])


@pytest.mark.parametrize("name", _NAMES)
def test_the_bases_state_stays(name: str) -> None:
    state = base(name, FLOAT).state_dict()
    after = grafted(name, FLOAT, "unipelt").state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert all(key.startswith("adapters.") for key in after.keys() - state.keys())


@pytest.mark.parametrize("name", ["bert_sdpa", "own_pre_sdpa_bool", "encoder_script_post"])
def test_a_second_graft_adds_to_the_banks(name: str) -> None:
    directories = {
        config: saved_adapter(VARIANTS[name], FLOAT, config).directory for config in ("unipelt", "mam", "lora_all")
    }
    at_once = torchgraft.graft(base(name, FLOAT), adapters=directories)
    one_by_one = base(name, FLOAT)
    for config, directory in directories.items():
        one_by_one = torchgraft.graft(one_by_one, adapters={config: directory})
        assert one_by_one.active_adapter() == config
    assert one_by_one.adapter_names() == list(directories)
    assert at_once.state_dict().keys() == one_by_one.state_dict().keys()
    arguments = _arguments(name)
    for config in directories:
        at_once.activate(config)
        one_by_one.activate(config)
        alone = grafted(name, FLOAT, config)
        with torch.no_grad():
            for a, b, c in zip(*(_tensors(m(*arguments)) for m in (at_once, one_by_one, alone)), strict=True):
                assert torch.equal(a, b)
                assert difference(a, c) <= 1e-5


def test_configs_are_kept() -> None:
    module = grafted("bert_sdpa", FLOAT, "unipelt")
    assert json.loads(module.adapter_config("task")) == torchgraft.UniPELTConfig().to_dict()


@pytest.mark.parametrize("method", ["activate", "adapter_config"])
def test_an_unknown_name_lists_the_known_ones(method: str) -> None:
    with pytest.raises(Exception, match="no adapter is called 'other'; there are: task"):
        getattr(grafted("bert_sdpa", FLOAT, "mam"), method)("other")


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(torchgraft.GraftError, match="already has an adapter 'task'"):
        torchgraft.graft(grafted("bert_sdpa", FLOAT, "mam"), config="lora", name="task")


@pytest.mark.parametrize("name", ["", "a.b", "two\nlines"])
def test_a_name_without_text_or_with_a_dot_is_refused(name: str) -> None:
    with pytest.raises(torchgraft.GraftError, match="cannot be an adapter's name"):
        torchgraft.graft(base("bert_sdpa", FLOAT), config="lora", name=name)


@pytest.mark.parametrize("config", ["unipelt", "mam", "union_everything"])
def test_every_adapter_parameter_gets_a_gradient(config: str) -> None:
    saved = saved_adapter(VARIANTS["bert_sdpa"], torch.float64, config)
    made = torchgraft.graft(base("bert_sdpa", torch.float64), adapters={"task": saved.directory}, trainable=True)
    module = torch.jit.load(_saved_copy(made))
    arguments = VARIANTS["bert_sdpa"].arguments(make_batch([9, 6], 9, torch.float64))
    module(*arguments)[0].square().sum().backward()
    trained = torchgraft.trainable_parameters(module, "task")
    assert trained.keys() == torchgraft.trainable_parameters(made, "task").keys()
    for name, parameter in module.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.ne(0).any())
        assert has_gradient == (name in trained), name


def test_threads_share_one_module() -> None:
    module = grafted("bert_sdpa", FLOAT, "unipelt")
    batches = [_arguments("bert_sdpa", lengths) for lengths in ((9, 6), (4,), (7, 7, 2), (5, 5))]
    with torch.no_grad():
        expected = [module(*arguments)[0] for arguments in batches]
    wrong = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if difference(module(*batches[index])[0], expected[index]) > 1e-6:
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    module = torch.jit.load(_saved_copy(grafted("own_post_sdpa", FLOAT, "unipelt"))).to(dtype)
    arguments = _arguments("own_post_sdpa", (9, 9))
    with torch.no_grad():
        expected = grafted("own_post_sdpa", FLOAT, "unipelt")(*arguments)
        actual = module(arguments[0].to(dtype), *arguments[1:])
    assert actual.dtype == dtype
    assert difference(actual.float(), expected) < 0.3


def test_what_does_not_fit_is_named(tmp_path) -> None:
    from transformers import BertConfig, BertModel

    import adapters

    other = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, vocab_size=50)
    )
    adapters.init(other)
    other.add_adapter("small", config="lora")
    other.save_adapter(str(tmp_path), "small")
    with pytest.raises(torchgraft.GraftError, match="trained for hidden size 32, the model has 48"):
        torchgraft.graft(base("bert_sdpa", FLOAT), adapters={"task": tmp_path})


def test_a_module_without_attention_is_refused() -> None:
    module = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
    with pytest.raises(torchgraft.GraftError, match="no attention was found"):
        torchgraft.graft(module, config="unipelt", name="task")
    assert torchgraft.inspect(module)["layers"] == []


def test_a_plain_module_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"torch\.jit\.trace"):
        torchgraft.graft(torch.nn.Linear(2, 2), config="lora", name="task")


NAMES = [
    "sst-2",
    "lang/en@ukp",
    "2nd",
    "white space",
    "ümlaut",
    'it\'s "quoted" \\ {here}',
    "a_x2d",
    "a-",
    "a_x2d_",
    "__",
]


@pytest.mark.parametrize(
    "trainable",
    [pytest.param(False, id="frozen"), pytest.param(True, id="trainable", marks=pytest.mark.slow(seconds=8))],
)
def test_a_name_is_any_text_without_dots(trainable: bool, tmp_path) -> None:
    """All at once: no two names are one attribute in TorchScript."""
    module = base("bert_sdpa", FLOAT)
    for name in NAMES:
        module = torchgraft.graft(module, config="unipelt", name=name, trainable=trainable)
    module.save(tmp_path / "grafted.pt")
    loaded = torch.jit.load(tmp_path / "grafted.pt")
    assert loaded.adapter_names() == NAMES
    for name in NAMES:
        loaded.activate(name)
        assert loaded.active_adapter() == name
        torchgraft.save_adapter(loaded, name, tmp_path / "saved", overwrite=True)
        again = torchgraft.load_adapter(base("bert_sdpa", FLOAT), tmp_path / "saved")
        assert again.adapter_names() == [name]
        if trainable:
            assert len(torchgraft.trainable_parameters(loaded, name)) == len(
                torchgraft.trainable_parameters(loaded, "__")
            )
    renamed = torchgraft.rename_adapter(loaded, "sst-2", "SST 2")
    assert "SST 2" in torchgraft.remove_adapter(renamed, "2nd").adapter_names()
