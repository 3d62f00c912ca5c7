"""Errors of torchgraft, and the text of torch's."""

from ._libraries import patcher


class GraftError(ValueError):
    """torchgraft refuses a module, a configuration, a file or a call. The message says why and what to do."""


class CommandLineError(GraftError):
    """What a command line asks for does not go with the files that it names. The command ends with status 2."""


def one_line(error: BaseException) -> str:
    """Returns what went wrong as one line: the first one, or what TorchScript raised, without its trace."""
    return patcher().one_line(str(error))
