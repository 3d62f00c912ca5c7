"""The options of a training run."""

from dataclasses import dataclass, fields
from typing import Any

from ..errors import GraftError

SCHEDULES = ("linear", "cosine", "constant")
CRITERIA = ("accuracy", "macro_f1", "loss")
# The learning rates of the parts of an adapter, where the user gives none. They were chosen on validation sentences of
# examples/sentiment (docs/training.md), but for that of AdapterFusion layers, which was not measured. A parallel
# bottleneck multiplies its result by 4 (scaling), and so its steps.
DEFAULT_RATES = {"adapter": 3e-3, "parallel": 5e-4, "prefix": 5e-4, "head": 1e-2, "fusion": 5e-4}


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: the most passes over the training examples.
        batch_size: the number of examples in one batch, over all processes.
        accumulate: the number of batches for one step of the optimizer, which minimises the mean loss of all their
            examples.
        learning_rate: AdamW's, of all parts without a rate of their own. None: each part has that of DEFAULT_RATES.
        head_learning_rate, prefix_learning_rate, parallel_learning_rate: the learning rates of the head, of prefixes
            with their MLPs and gates, and of parallel bottlenecks. None: `learning_rate`. A short run needs a higher
            rate for the head; the others tolerate only a lower one.
        weight_decay: AdamW's.
        schedule: how the learning rate falls after the warm-up: "linear" or "cosine" to zero, or "constant".
        warmup: the share of all steps in which the learning rate rises from zero.
        clip: the largest norm of all gradients together; larger ones are scaled down. 0: no limit.
        patience: stop after this many epochs without a better validation score. 0: never.
        best_by: the validation score that decides which epoch's weights are kept: "accuracy", "macro_f1" or "loss". Of
            epochs with equal scores the one with the lower loss is kept.
        seed: decides the order of examples and dropout.
        checkpoint_every: the number of steps between two checkpoints. Each epoch also ends with one.

    Raises:
        GraftError: a value is out of range, or unknown.
    """

    epochs: int = 3
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    prefix_learning_rate: float | None = None
    parallel_learning_rate: float | None = None
    weight_decay: float = 0.01
    schedule: str = "linear"
    warmup: float = 0.06
    clip: float = 1.0
    patience: int = 0
    best_by: str = "accuracy"
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("checkpoint_every", 1),
                            ("patience", 0), ("clip", 0), ("weight_decay", 0), ("seed", 0)):  # fmt: skip
            if not getattr(self, name) >= least:
                raise GraftError(f"training: expected {name} >= {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "head_learning_rate", "prefix_learning_rate", "parallel_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < float("inf"):
                raise GraftError(f"training: expected {name} > 0, got {rate}")
        if not 0 <= self.warmup < 1:
            raise GraftError(f"training: expected 0 <= warmup < 1, got {self.warmup}")
        for name, known in (("schedule", SCHEDULES), ("best_by", CRITERIA)):
            if getattr(self, name) not in known:
                raise GraftError(f"training: expected {name} among {', '.join(known)}, got '{getattr(self, name)}'")

    def rate_of(self, part: str) -> float:
        """Returns the learning rate of a part: "adapter", "parallel", "prefix", "head" or "fusion"."""
        own = {"head": self.head_learning_rate, "prefix": self.prefix_learning_rate,
               "parallel": self.parallel_learning_rate}  # fmt: skip
        return own.get(part) or self.learning_rate or DEFAULT_RATES[part]

    def as_dict(self) -> dict[str, Any]:
        """Returns the options by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
