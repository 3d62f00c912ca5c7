"""Errors of torchgraft, and the text of torch's."""

from ._libraries import patcher


class GraftError(ValueError):
    """A module, configuration or checkpoint that cannot be grafted; the message says why and what to do."""


def one_line(error: BaseException) -> str:
    """What went wrong, as one line: the first, or, behind a trace of TorchScript's, the text of what it raised."""
    return patcher().one_line(str(error))
