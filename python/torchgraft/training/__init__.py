"""Trains adapters on texts with classes (docs/training.md). scripts/train.py is its command line."""

from .batches import EncodedExamples, encode_examples
from .examples import Columns, Example, class_names, read_examples, split_examples
from .listeners import Listener, ProgressBar, TensorBoardLog
from .metrics import Scores
from .options import TrainingOptions
from .trainer import Trainer, TrainingResult, score
from .workers import Workers

__all__ = [
    "Columns",
    "EncodedExamples",
    "Example",
    "Listener",
    "ProgressBar",
    "Scores",
    "TensorBoardLog",
    "Trainer",
    "TrainingOptions",
    "TrainingResult",
    "Workers",
    "class_names",
    "encode_examples",
    "read_examples",
    "score",
    "split_examples",
]
