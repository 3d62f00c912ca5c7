"""A small random BERT with a tokenizer of its own, and sentences whose class their words tell."""

import csv
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

import torchgraft
from torchgraft.training import EncodedExamples, Example, encode_examples

LABELS = ["bad", "good", "so_so"]
_TELLING = {"bad": ["awful", "dull", "poor"], "good": ["fine", "great", "lovely"], "so_so": ["usual", "plain", "even"]}
_OTHERS = ["the", "film", "was", "a", "and", "story", "of", "it", "very", "cast"]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


class Encoder(torch.nn.Module):
    """(ids, mask), both [B, S] -> [B, S, 32]."""

    def __init__(self, model: BertModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask, return_dict=False)[0]


def words() -> list[str]:
    return _SPECIAL + _OTHERS + [word for group in _TELLING.values() for word in group]


def make_bert(seed: int = 0) -> BertModel:
    """Two layers of size 32, without dropout."""
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(words()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=64, max_position_embeddings=64, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0, initializer_range=0.2)  # fmt: skip
    return BertModel(config).eval()


def make_base(seed: int = 0) -> torch.jit.ScriptModule:
    example = (torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64))
    return torch.jit.trace(Encoder(make_bert(seed)), example, check_trace=False)


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words())}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(pad_id=0)
    return tokenizer


def make_examples(count: int, seed: int = 0) -> list[Example]:
    """Of different lengths; classes in turn."""
    chosen = random.Random(seed)
    examples = []
    for index in range(count):
        label = LABELS[index % len(LABELS)]
        text = chosen.choices(_OTHERS, k=chosen.randint(2, 9)) + chosen.choices(_TELLING[label], k=2)
        chosen.shuffle(text)
        examples.append(Example(" ".join(text), label, f"examples, line {index + 2}"))
    return examples


def encoded(count: int, seed: int = 0) -> EncodedExamples:
    return encode_examples(make_tokenizer(), make_examples(count, seed), LABELS)


def make_model(config: str = "unipelt", dropout: float = 0.1) -> torch.jit.ScriptModule:
    """Grafted, trainable, with a head; the same at each call."""
    torch.manual_seed(1)
    module = torchgraft.graft(make_base(), config, "task", trainable=True)
    head = torchgraft.HeadConfig(num_labels=len(LABELS), labels=LABELS, pooling="mean", layers=1, dropout_prob=dropout)
    return torchgraft.add_head(module, "task", head)


@dataclass(frozen=True)
class Files:
    """What scripts/train.py reads."""

    base: Path
    train: Path
    validation: Path


def write_csv(path: Path, examples: list[Example]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((example.text, example.label) for example in examples)
    return path


def write_files(folder: Path) -> Files:
    make_base().save(str(folder / "base.pt"))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return Files(
        folder / "base.pt",
        write_csv(folder / "train.csv", make_examples(50, 0)),
        write_csv(folder / "validation.csv", make_examples(21, 1)),
    )
