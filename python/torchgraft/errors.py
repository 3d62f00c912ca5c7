"""Errors of torchgraft."""


class GraftError(ValueError):
    """A module, configuration or checkpoint that cannot be grafted; the message says why and what to do."""
