"""Which examples make a batch, and the tensors of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .examples import Example, class_indices

# Batches are cut from so many batches' worth of examples in order of length: little padding, still much shuffling.
_BATCHES_PER_POOL = 16


@dataclass(frozen=True)
class EncodedExamples:
    """Tokenised texts with their classes.

    token_ids, type_ids: one list of whole numbers per example; labels: [N] int64; where: the places in files.
    """

    token_ids: list[list[int]]
    type_ids: list[list[int]]
    labels: Tensor
    where: list[str]
    pad_id: int = 0
    pad_type_id: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.token_ids]

    def chosen(self, indices: Sequence[int]) -> "EncodedExamples":
        """Some of the examples, in the order of `indices`."""
        return EncodedExamples(
            [self.token_ids[i] for i in indices], [self.type_ids[i] for i in indices],
            self.labels[torch.tensor(list(indices), dtype=torch.int64)], [self.where[i] for i in indices],
            self.pad_id, self.pad_type_id,
        )  # fmt: skip


def encode_examples(tokenizer: Any, examples: Sequence[Example], names: Sequence[str]) -> EncodedExamples:
    """Tokenises with a tokenizers.Tokenizer; classes are positions in `names`.

    Raises:
        GraftError: an unknown label.
    """
    labels = class_indices(examples, names)
    padding = tokenizer.padding or {}
    tokenizer.no_padding()  # batches pad, each to its own longest text
    encodings = tokenizer.encode_batch([example.text for example in examples])
    return EncodedExamples(
        [encoding.ids for encoding in encodings], [encoding.type_ids for encoding in encodings], labels,
        [example.where for example in examples], padding.get("pad_id", 0), padding.get("pad_type_id", 0),
    )  # fmt: skip


def training_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, each example once: a function of the arguments alone, so that a run can be taken up in
    the middle of an epoch, by any number of processes."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    pool_size = _BATCHES_PER_POOL * batch_size
    for begin in range(0, len(order), pool_size):
        pool = sorted(order[begin : begin + pool_size], key=lambda index: lengths[index])
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def scoring_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Every example once, in order of length."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class Batch:
    """values: "ids", "mask" (1 = token, 0 = padding) and "type", each [B, S] int64; labels: [B] int64."""

    values: dict[str, Tensor]
    labels: Tensor


def collate(examples: EncodedExamples, indices: Sequence[int], part: slice, device: torch.device) -> Batch | None:
    """The tensors of `indices[part]`, or None if that is nothing.

    Padded to the longest of all `indices`: gates are means over padding too, so that a row's result would otherwise
    depend on which process has it.
    """
    width = max(len(examples.token_ids[index]) for index in indices)
    rows = list(indices[part])
    if not rows:
        return None
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    ids, types = torch.full_like(mask, examples.pad_id), torch.full_like(mask, examples.pad_type_id)
    for row, index in enumerate(rows):
        length = len(examples.token_ids[index])
        ids[row, :length] = torch.tensor(examples.token_ids[index])
        types[row, :length] = torch.tensor(examples.type_ids[index])
        mask[row, :length] = 1
    values = {"ids": ids, "mask": mask, "type": types}
    labels = examples.labels[torch.tensor(rows)]
    return Batch({key: value.to(device) for key, value in values.items()}, labels.to(device))
