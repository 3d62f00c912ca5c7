"""LoRAs of PEFT on embeddings: the rows of a table, looked up for each token."""

import functools
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torchgraft
from hugging_face_models import FAMILIES, Family
from peft_support import save_random_lora

_LLAMA = FAMILIES["llama"]
_MODELS = {
    "bert": FAMILIES["bert"],
    "llama": _LLAMA,
    "tied": Family(hf.BertConfig, hf.BertForMaskedLM, FAMILIES["bert"].sizes),
}
_CASES = {
    "beside a projection, with dropout": ("bert", dict(target_modules=["query", "word_embeddings"], lora_dropout=0.2)),
    "two tables of other ranks": (
        "bert",
        dict(
            target_modules=["value", "word_embeddings", "token_type_embeddings"],
            rank_pattern={"word_embeddings": 2, "token_type_embeddings": 5},
            alpha_pattern={"word_embeddings": 3},
        ),
    ),
    "alone": ("bert", dict(target_modules=["word_embeddings"], use_rslora=True)),
    "of a decoder": ("llama", dict(target_modules=["q_proj", "embed_tokens"])),
}


def _arguments(name: str, seed: int) -> tuple:
    return _MODELS[name].arguments(torch.float64, seed)


def _make(name: str) -> nn.Module:
    return _MODELS[name].make("eager", torch.float64)


def _hidden(result: Tensor | tuple) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _traced(name: str) -> torch.jit.ScriptModule:
    return torch.jit.trace(_make(name), _arguments(name, 0), check_trace=False, strict=False)


def _train(name: str, options: dict, folder: Path) -> Tensor:
    """Saves a random adapter in the folder. Returns what PEFT gives."""
    model = _make(name)
    save_random_lora(model.model, options, folder)
    with torch.no_grad():
        return _hidden(model(*_arguments(name, 1)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", _CASES)
def test_equals_peft(case: str, tmp_path: Path) -> None:
    name, options = _CASES[case]
    base = _traced(name)
    expected = _train(name, options, tmp_path)
    module = torchgraft.load_adapter(base, tmp_path, "task")
    arguments, tolerance = _arguments(name, 1), 1e-5 if name == "llama" else 1e-10  # LLaMA's norms are in float32
    with torch.no_grad():
        plain = _hidden(base(*arguments))
        assert (plain - expected).abs().max() > 1e-3
        for each in (module, torchgraft.lower(module)):
            torch.testing.assert_close(_hidden(each(*arguments)), expected, rtol=tolerance, atol=tolerance)
            ids = torch.arange(plain.size(0)) % 2 - 1
            mixed = _hidden(each(*arguments, adapter_ids=ids))
            for row, adapter in enumerate(ids.tolist()):
                wanted = plain if adapter < 0 else expected
                torch.testing.assert_close(mixed[row], wanted[row], rtol=tolerance, atol=tolerance)
    torchgraft.save_adapter(module, "task", tmp_path / "again")
    again = torchgraft.load_adapter(base, tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(_hidden(again(*arguments)), _hidden(module(*arguments)), rtol=0, atol=1e-12)


def _adapter(tmp_path: Path) -> Path:
    _train("bert", dict(target_modules=["query", "word_embeddings"]), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "change", [lambda module: module, functools.partial(torchgraft.lower, verify=False)], ids=["operators", "lowered"]
)
def test_numbers_of_the_first_adapter_reach_no_row_of_the_base(change, tmp_path: Path) -> None:
    module = torchgraft.load_adapter(_traced("bert"), _adapter(tmp_path), "task")
    with torch.no_grad():
        for name, bank in module.adapters.named_buffers():
            if bank.is_floating_point() and "linear_lora" in name:
                bank.fill_(torch.nan)
        expected = _hidden(module.base_forward(*_arguments("bert", 1)))
        none = torch.full((expected.size(0),), -1)
        rows = _hidden(change(module)(*_arguments("bert", 1), adapter_ids=none))
        torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("change", [lambda module: module, torchgraft.lower], ids=["operators", "lowered"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0] * 9, r"gated_lora: expected adapter_ids of shape \[\d\], got \[9\]"),
        (None, r"in \[-1, 1\), got 7 in row 0"),
    ],
)
def test_wrong_adapter_ids_are_named(change, ids: list[int] | None, message: str, tmp_path: Path) -> None:
    module = change(torchgraft.load_adapter(_traced("bert"), _adapter(tmp_path), "task"))
    arguments = _arguments("bert", 1)
    with pytest.raises(torch.jit.Error, match=message):
        module(*arguments, adapter_ids=torch.tensor(ids or [7] * arguments[0].size(0)))


def test_a_table_that_max_norm_writes_into_is_refused(tmp_path: Path) -> None:
    model = _make("bert")
    model.model.embeddings.word_embeddings.max_norm = 0.5
    base = torch.jit.trace(model, _arguments("bert", 0), check_trace=False, strict=False)
    with pytest.raises(torchgraft.GraftError, match="no linear map or embedding that is applied once"):
        torchgraft.load_adapter(base, _adapter(tmp_path), "task")


def test_weights_of_two_kinds_are_refused(tmp_path: Path) -> None:
    directory = _adapter(tmp_path)
    weights = load_file(directory / "adapter_model.safetensors")
    path = next(key for key in weights if "lora_embedding_A" in key).removesuffix(".lora_embedding_A")
    more = {f"{path}.lora_A.weight": torch.zeros(4, 3), f"{path}.lora_B.weight": torch.zeros(3, 4)}
    save_file(weights | more, directory / "adapter_model.safetensors")
    with pytest.raises(torchgraft.GraftError, match="has weights of a linear map and of an embedding"):
        torchgraft.load_adapter(_traced("bert"), directory, "task")


def test_a_pool_has_rows_for_it(tmp_path: Path) -> None:
    base, directory = _traced("bert"), _adapter(tmp_path)
    arguments = _arguments("bert", 1)
    pool = torchgraft.AdapterPool(base, capacity=2)
    pool.insert("task", directory)
    with torch.no_grad():
        expected = _hidden(torchgraft.load_adapter(base, directory, "task")(*arguments))
        names = ["task", *[""] * (expected.size(0) - 1)]
        with pool.acquire(names) as lease:
            rows = _hidden(lease.module(*arguments, adapter_ids=torch.tensor(lease.ids)))
        torch.testing.assert_close(rows[0], expected[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(rows[1:], _hidden(base(*arguments))[1:], rtol=1e-10, atol=1e-10)


def test_it_is_trained_further_with_the_gradients_of_peft(tmp_path: Path) -> None:
    directory = _adapter(tmp_path)
    module = torchgraft.load_adapter(_traced("bert"), directory, "task", trainable=True)
    model = _make("bert")
    tuned = peft.PeftModel.from_pretrained(model.model, str(directory), is_trainable=True).double().eval()
    (_hidden(model(*_arguments("bert", 1))) ** 2).sum().backward()
    (_hidden(module.eval()(*_arguments("bert", 1))) ** 2).sum().backward()
    (wanted,) = [value.grad for name, value in tuned.named_parameters() if "lora_embedding_A" in name]
    (found,) = [
        value.grad
        for name, value in torchgraft.trainable_parameters(module, "task").items()
        if "linear_lora" in name and name.endswith("lora_a")
    ]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_what_is_not_had_is_named(tmp_path: Path) -> None:
    module = torchgraft.load_adapter(_traced("bert"), _adapter(tmp_path), "a")
    with pytest.raises(torchgraft.GraftError, match="a LoRA on an embedding is not merged"):
        torchgraft.merge_adapter(module, "a")
    module = torchgraft.graft(module, "lora", "b")
    with pytest.raises(torchgraft.GraftError, match="'both' uses 'a', whose LoRA on an embedding"):
        torchgraft.compose(module, "both", torchgraft.Average("a", "b"))
    path = next(entry["path"] for entry in torchgraft.inspect(module)["linear_maps"] if entry["embedding"])
    for field in ({"use_gating": True}, {"use_dora": True}, {"composition_mode": "scale"}):
        config = {"architecture": "lora", "r": 1, "linear_maps": [path]} | field
        with pytest.raises(torchgraft.GraftError, match="on the embedding .* a LoRA can be that adds B A"):
            torchgraft.graft(module, config, "c")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "tied",
            dict(target_modules=["word_embeddings"]),
            "is an embedding, and the model's .* a linear map .*untie the model's weights",
        ),
        ("bert", dict(target_modules=["word_embeddings"], use_dora=True), "is an embedding, on which DoRA"),
        (
            "bert",
            dict(target_modules=["query"], modules_to_save=["token_type_embeddings"]),
            "is an embedding that was trained as a whole",
        ),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict, message: str, tmp_path: Path) -> None:
    _train(name, options, tmp_path)
    with pytest.raises(torchgraft.GraftError, match=message):
        torchgraft.load_adapter(_traced(name), tmp_path, "task")
