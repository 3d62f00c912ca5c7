"""What benchmarks/models.py has measured."""

from dataclasses import dataclass

BASE = "base"  # the variant whose time is 1


@dataclass
class Row:
    """ratio: the median's ratio to the base's; quartiles: of the rounds' own ratios; largest_error: of the outputs, to
    those of the same model in TorchScript, where the variant computes the same function."""

    model: str
    shape: str
    threads: int
    config: str
    variant: str
    milliseconds: float
    ratio: float
    quartiles: tuple[float, float]
    largest_error: float | None = None
