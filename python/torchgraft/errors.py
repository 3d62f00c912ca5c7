"""Errors of torchgraft, and the text of torch's."""

from ._libraries import patcher


class GraftError(ValueError):
    """torchgraft refuses a module, a configuration, a file or a call. The message says why and what to do."""


def one_line(error: BaseException) -> str:
    """Returns what went wrong as one line: the first, or, behind a trace of TorchScript's, the text of what it raised."""
    return patcher().one_line(str(error))
