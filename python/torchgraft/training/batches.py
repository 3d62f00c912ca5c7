"""Divides examples into batches, and makes the tensors of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .examples import Example, class_indices

# The examples of this many batches are sorted by length before they are cut into batches: this leaves little padding,
# and the batches still differ from epoch to epoch.
_BATCHES_PER_POOL = 16


@dataclass(frozen=True)
class EncodedExamples:
    """N tokenised texts with their classes.

    Attributes:
        token_ids, type_ids: a list of integers for each example.
        labels: int64 [N], the classes.
        where: "FILE, line N" for each example, for messages.
        pad_id, pad_type_id: the token and the type that pad shorter texts.
        cut: how many texts had more tokens than the tokenizer was asked for.
    """

    token_ids: list[list[int]]
    type_ids: list[list[int]]
    labels: Tensor
    where: list[str]
    pad_id: int = 0
    pad_type_id: int = 0
    cut: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def lengths(self) -> list[int]:
        """Returns the number of tokens of each example."""
        return [len(ids) for ids in self.token_ids]

    def chosen(self, indices: Sequence[int]) -> "EncodedExamples":
        """Returns the examples at `indices`, in this order."""
        return EncodedExamples(
            [self.token_ids[i] for i in indices], [self.type_ids[i] for i in indices],
            self.labels[torch.tensor(list(indices), dtype=torch.int64)], [self.where[i] for i in indices],
            self.pad_id, self.pad_type_id,
        )  # fmt: skip


def encode_examples(tokenizer: Any, examples: Sequence[Example], names: Sequence[str]) -> EncodedExamples:
    """Tokenises examples and looks up their classes.

    Args:
        tokenizer: a tokenizers.Tokenizer. Its padding is switched off.
        examples: the texts with their labels.
        names: the names of the classes. A class is a position in it.

    Raises:
        GraftError: a label is unknown.
    """
    labels = class_indices(examples, names)
    padding = tokenizer.padding or {}
    tokenizer.no_padding()  # collate() pads each batch to its longest text
    encodings = tokenizer.encode_batch([example.text for example in examples])
    return EncodedExamples(
        [encoding.ids for encoding in encodings], [encoding.type_ids for encoding in encodings], labels,
        [example.where for example in examples], padding.get("pad_id", 0), padding.get("pad_type_id", 0),
        sum(bool(encoding.overflowing) for encoding in encodings),
    )  # fmt: skip


def training_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Returns the batches of one epoch, as positions in `lengths`; each example occurs once. The result depends only on
    the arguments, so that any number of processes can resume a run in the middle of an epoch."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    pool_size = _BATCHES_PER_POOL * batch_size
    for begin in range(0, len(order), pool_size):
        pool = sorted(order[begin : begin + pool_size], key=lambda index: lengths[index])
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def scoring_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Returns batches with every example once, in order of length."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class Batch:
    """values: "ids", "mask" (1 = token, 0 = padding) and "type", each int64 [B, S]; labels: int64 [B]."""

    values: dict[str, Tensor]
    labels: Tensor


def collate(examples: EncodedExamples, indices: Sequence[int], part: slice, device: torch.device) -> Batch | None:
    """Returns the tensors of the examples `indices[part]` on `device`, or None if this part is empty.

    Rows are padded to the longest of all `indices`, not of the part: gates are means over padding, too, and a row's
    result would otherwise depend on the process that has it.
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
