"""scripts/graft.py: what it prints and when; full disks and closed pipes."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

import torchgraft
from grafted import base, grafted
from odd_layers import Plain as AttentionOnly
from odd_layers import TwoLayers, batch
from scripts_here import SCRIPTS, run_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messages")
    base("bert_sdpa", torch.float32).save(folder / "base.pt")
    grafted("bert_sdpa", torch.float32, "unipelt").save(folder / "model.pt")
    torchgraft.save_adapter(grafted("bert_sdpa", torch.float32, "unipelt"), "task", folder / "saved")
    return folder


def test_a_configuration_that_is_none_is_said_before_anything_is_printed(folder: Path) -> None:
    done = run_here("graft.py", "inspect", folder / "base.pt", "--config", "unipel")
    assert (done.returncode, done.stdout) == (1, "") and "no configuration is called 'unipel'" in done.stderr


def test_a_stranger_s_text_commands_no_terminal(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "\x1b[31m\x07\x9b31m"}))
    done = run_here("graft.py", "load", folder / "base.pt", tmp_path, "-o", tmp_path / "out.pt")
    assert done.returncode == 1 and "PEFT's ?[31m??31m is not supported" in done.stderr
    assert done.stderr.rstrip("\n").isprintable()


def test_add_tells_the_adapter_s_size_from_the_file_s(folder: Path, tmp_path: Path) -> None:
    done = run_here("graft.py", "add", folder / "base.pt", "-o", tmp_path / "out.pt", "--config", "lora", "--name", "a")
    (info,) = torchgraft.list_adapters(torch.jit.load(tmp_path / "out.pt"))
    size = (tmp_path / "out.pt").stat().st_size
    expected = f"{info.parameters:,} parameters added ({info.bytes / 1e3:.1f} kB); the file has {size / 1e3:.1f} kB; "
    assert expected in done.stdout and info.bytes < 100_000 < size < 1_000_000


def test_a_reader_that_closes_the_pipe_is_told_nothing(folder: Path) -> None:
    command = f"{sys.executable} {SCRIPTS / 'graft.py'} match {folder / 'base.pt'} {folder / 'saved'}"
    # The reader ends before the first line is written.
    done = subprocess.run(f"{command} | true; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash", text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    assert (done.returncode, done.stderr) in ((0, ""), (141, ""))  # it may be written before the reader ends


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_full_disk_leaves_no_directory_and_names_the_file(safetensors: bool, tmp_path: Path) -> None:
    module = grafted("bert_sdpa", torch.float32, "unipelt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (99, limits[1]))
    try:
        with pytest.raises(torchgraft.GraftError) as raised:
            torchgraft.save_adapter(module, "task", tmp_path / "new" / "saved", safetensors=safetensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "new" / "saved") in str(raised.value) and "cannot write (File too large)" in str(raised.value)
    assert "torchgraft-tmp" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_note_of_all_layers_stands_once(tmp_path: Path) -> None:
    module = torch.jit.trace(TwoLayers(AttentionOnly()).eval(), batch(), check_trace=False)
    with pytest.raises(torchgraft.GraftError, match="no output_adapter in layers 0, 1") as raised:
        torchgraft.graft(module, "seq_bn", "task")
    assert str(raised.value).count("feed-forward") == 1 and "; layers 0, 1: " in str(raised.value)
    module.save(tmp_path / "two.pt")
    shown = run_here("graft.py", "inspect", tmp_path / "two.pt").stdout
    assert shown.count("feed-forward") == 1 and "layers 0-1, self attention: " in shown


class _TakesStates(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.layer(states)


def test_a_model_without_token_ids_is_named_by_what_needs_them(tmp_path: Path) -> None:
    base = torch.jit.trace(_TakesStates().eval(), torch.randn(2, 5, 32), check_trace=False)
    torchgraft.graft(base, "unipelt", "task").save(str(tmp_path / "model.pt"))
    words = tokenizers.models.WordLevel({"<unk>": 0, "a": 1}, "<unk>")
    (tmp_path / "tokenizer.json").write_text(tokenizers.Tokenizer(words).to_str())
    for command in (["gates", "{}", "--text", "a"], ["export", "{}", "-o", str(tmp_path / "out.pt2")]):
        done = run_here("graft.py", *[part.format(tmp_path / "model.pt") for part in command])
        assert done.returncode == 1
        assert "forward(states, adapter_ids) does not run on the token ids of texts" in done.stderr
        assert "Dimension" not in done.stderr


def test_names_of_another_type_are_named() -> None:
    module = torchgraft.graft(base("bert_sdpa", torch.float32), "lora", "task")
    for call in (lambda: module.activate(["task"]), lambda: module.adapter_config(0)):
        with pytest.raises(TypeError, match="expected the name of one adapter, got (list|int)"):
            call()
    pool = torchgraft.AdapterPool(base("bert_sdpa", torch.float32), capacity=1)
    for names in ("task", [0]):
        for acquire in (pool.acquire, pool.try_acquire):
            with pytest.raises(TypeError, match="expected a list with the name of each row's adapter"):
                acquire(names)


@pytest.mark.parametrize("ids", [[0, 0], 0, "task", (0, -1)], ids=repr)
def test_adapter_ids_of_another_type_are_named(ids: object, folder: Path) -> None:
    """By the module that was grafted and by one that was loaded; what is no list stays TorchScript's matter."""
    tokens = torch.ones(2, 3, dtype=torch.int64)
    for module in (grafted("bert_sdpa", torch.float32, "unipelt"), torchgraft.load_module(folder / "model.pt")):
        for method in (module, module.forward, module.forward_with_gates):
            with pytest.raises(TypeError, match="expected adapter_ids to be an int64 tensor .*, got ") as raised:
                method(tokens, tokens, adapter_ids=ids)
            assert "\n" not in str(raised.value) and raised.value.__context__ is None
            method(tokens, tokens, adapter_ids=torch.tensor([0, -1]))
        with pytest.raises(RuntimeError, match="argument 'input_ids'"):
            module([1, 2], tokens)
        assert module.forward.schema.arguments[-1].name == "adapter_ids"


def test_a_pool_says_that_an_adapter_may_have_left(tmp_path: Path) -> None:
    torchgraft.save_adapter(torchgraft.graft(base("bert_sdpa", torch.float32), "lora", "task"), "task", tmp_path)
    pool = torchgraft.AdapterPool(base("bert_sdpa", torch.float32), capacity=1)
    pool.insert("first", tmp_path)
    pool.insert("second", tmp_path)
    with pytest.raises(torchgraft.GraftError, match=r"'first' is in memory: .* gave its row up .* In memory: second"):
        pool.acquire(["first"])


@pytest.mark.parametrize("config", [{}, "{}"])
def test_an_empty_object_is_no_configuration(config: object, tmp_path: Path) -> None:
    if isinstance(config, str):
        (tmp_path / "adapter_config.json").write_text(config)
        config = tmp_path / "adapter_config.json"
    with pytest.raises(torchgraft.GraftError, match=r"expected the fields of an adapter's configuration.*got \{\}"):
        torchgraft.graft(base("bert_sdpa", torch.float32), config, "task")


def test_an_adapter_without_gates_names_those_that_have_some(tmp_path: Path) -> None:
    plain = torchgraft.graft(base("bert_sdpa", torch.float32), "lora", "plain")
    words = {word: index for index, word in enumerate(["<unk>", "a"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>")).save(str(tmp_path / "tokenizer.json"))
    both = torchgraft.graft(plain, "unipelt", "gated")
    for module, told in ((plain, "nor has any other of the file"), (both, "these have: gated")):
        module.save(str(tmp_path / "model.pt"))
        done = run_here("graft.py", "gates", tmp_path / "model.pt", "--text", "a", "--adapter", "plain")
        assert done.returncode == 1 and "the adapter 'plain' has no gates" in done.stderr and told in done.stderr


def test_places_of_every_method_are_told(folder: Path, tmp_path: Path) -> None:
    for config, places in (("loreft", "in 3 layers: output_reft_linear x 3"), ("seq_bn_inv", "inv_adapter_nice_relu")):
        for more in ([], ["--trainable"]):
            wanted = ["--config", config, "--name", "t", *more]
            done = run_here("graft.py", "add", folder / "base.pt", "-o", tmp_path / "out.pt", *wanted)
            assert done.returncode == 0 and places in done.stdout, done


def test_an_optimised_file_that_changes_says_that_it_is_not_optimised_any_more(folder: Path, tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast.pt", tmp_path / "slow.pt"
    assert run_here("graft.py", "optimize", folder / "model.pt", "-o", fast).returncode == 0
    told = f"{fast} was optimised, {slow} is not: see torchgraft optimize"
    for words in (["load", fast, folder / "saved", "--name", "other"], ["rename", fast, "task", "other"]):
        assert told in run_here("graft.py", *words, "-o", slow).stdout
    done = run_here("graft.py", "add", fast, "-o", slow, "--config", "lora", "--name", "x")
    assert "the base was optimised, this file is not" in done.stdout
    assert "was optimised" not in run_here("graft.py", "rename", slow, "task", "other", "-o", tmp_path / "o.pt").stdout


def test_the_base_of_a_merged_file_is_told(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "merged.pt"
    torchgraft.merge_adapter(torchgraft.graft(base("bert_sdpa", torch.float32), "lora", "l"), "l").save(str(path))
    done = run_here("graft.py", "ungraft", path, "-o", tmp_path / "base.pt")
    assert done.stdout.endswith(": the base with the merged weights of 'l'; no adapters\n")


def test_a_trainable_adapter_is_named_before_int8(folder: Path, tmp_path: Path) -> None:
    assert run_here("graft.py", "unfreeze", folder / "model.pt", "task", "-o", tmp_path / "u.pt").returncode == 0
    done = run_here("graft.py", "quantize", tmp_path / "u.pt", "-o", tmp_path / "out.pt")
    assert done.returncode == 1 and "quantize: 'task' is trainable" in done.stderr and "freeze" in done.stderr
    assert run_here("graft.py", "quantize", folder / "model.pt", "-o", tmp_path / "q.pt").returncode == 0
    done = run_here("graft.py", "quantize", tmp_path / "q.pt", "-o", tmp_path / "out.pt")
    assert re.search(r"can be quantised: \d+ maps: it is packed already", done.stderr)


def test_gates_are_of_texts_with_tokens(folder: Path, tmp_path: Path) -> None:
    words = {word: index for index, word in enumerate(["<unk>", "a"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    gates = ["gates", folder / "model.pt", "--tokenizer", tmp_path / "tokenizer.json", "--text", "a"]
    for text in ("", " "):
        done = run_here("graft.py", *gates, "--text", text)
        assert done.returncode == 1 and "text 2 has no tokens" in done.stderr
    shown = run_here("graft.py", *gates, "--text", "a a").stdout.splitlines()
    assert shown[0].split() == ["layer", "0", "1", "2"] and shown[-1].startswith("mean of 2 texts")


@pytest.mark.parametrize("change", ["to_sparse", "meta"])
def test_weights_without_numbers_are_named(change: str, folder: Path, tmp_path: Path) -> None:
    module = torch.jit.load(str(folder / "model.pt"))
    torchgraft.save_adapter(module, "task", tmp_path / "a", safetensors=False)
    path = tmp_path / "a" / "pytorch_adapter.bin"
    weights = torch.load(path, weights_only=True)
    changed = {"to_sparse": torch.Tensor.to_sparse, "meta": lambda value: value.to("meta")}[change]
    torch.save({key: changed(value) for key, value in weights.items()}, path)
    with pytest.raises(torchgraft.GraftError, match=r"pytorch_adapter\.bin: .*: expected a dense tensor, got "):
        torchgraft.load_adapter(base("bert_sdpa", torch.float32), tmp_path / "a")


def test_loading_has_the_remedy_that_its_error_names(folder: Path, tmp_path: Path) -> None:
    module = torch.jit.load(str(folder / "model.pt"))
    torchgraft.save_adapter(module, "task", tmp_path / "a", safetensors=False)
    path = tmp_path / "a" / "pytorch_adapter.bin"
    torch.save({key: value * float("nan") for key, value in torch.load(path, weights_only=True).items()}, path)
    plain = base("bert_sdpa", torch.float32)
    with pytest.raises(torchgraft.GraftError, match="are its weights.; verify=False"):
        torchgraft.load_adapter(plain, tmp_path / "a")
    assert torchgraft.load_adapter(plain, tmp_path / "a", verify=False).adapter_names() == ["task"]


REFUSED = {
    "a module as example": (["lora", "--example", "{folder}/base.pt"], "inputs (it is a TorchScript module); expected"),
    "text as example": (["lora", "--example", "{folder}/saved/adapter_config.json"], "(it is of an unknown kind); exp"),
    "a LoRA of all memory": (["lora[r=1000000000]"], "GB for its weights, the machine has"),
    "prefixes of all memory": (["prefix_tuning[prefix_length=10000000000]"], "graft: 't' needs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_add_cannot_use_is_one_line_of_ours(case: str, folder: Path, tmp_path: Path) -> None:
    words, message = REFUSED[case]
    words = [word.format(folder=folder) for word in words]
    done = run_here("graft.py", "add", folder / "base.pt", "-o", tmp_path / "o.pt", "--name", "t", "--config", *words)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert "weights_only" not in done.stderr and list(tmp_path.iterdir()) == []
