"""The command `torchgraft`. Imports no torch before the command line is known to be right: torch takes seconds to load.

What the commands do stands in torchgraft._commands and its neighbours.
"""
