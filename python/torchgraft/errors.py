"""Errors of torchgraft."""


class GraftError(ValueError):
    """torchgraft refuses a module, a configuration, a file or a call. The message says why and what to do."""
