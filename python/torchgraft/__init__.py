"""torchgraft: gated adapters grafted onto TorchScript Transformers.

    base = torch.jit.load("base.pt")
    model = torchgraft.graft(base, config="unipelt", name="task")
    model.save("task.pt")

Importing the package registers the operators; a process that only serves needs no more than
`torch.ops.load_library(torchgraft.library_path())` and `torch.jit.load`.
"""

from ._libraries import library_path, load_operators
from .adapter_hub import AdapterDirectory, load_adapter_directory
from .configs import (
    BnConfig,
    ConfigUnion,
    DoubleSeqBnConfig,
    HoulsbyConfig,
    LoRAConfig,
    MAMConfig,
    ParallelConfig,
    ParBnConfig,
    PfeifferConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    UniPELTConfig,
)
from .errors import GraftError
from .grafting import graft, inspect

__version__ = "0.1.0"

load_operators()

__all__ = [
    "AdapterDirectory",
    "BnConfig",
    "ConfigUnion",
    "DoubleSeqBnConfig",
    "GraftError",
    "HoulsbyConfig",
    "LoRAConfig",
    "MAMConfig",
    "ParBnConfig",
    "ParallelConfig",
    "PfeifferConfig",
    "PrefixTuningConfig",
    "SeqBnConfig",
    "UniPELTConfig",
    "graft",
    "inspect",
    "library_path",
    "load_adapter_directory",
]
