"""torchgraft: gated adapters grafted onto TorchScript Transformers.

    base = torch.jit.load("base.pt")
    model = torchgraft.graft(base, config="unipelt", name="task")
    model.save("task.pt")

Importing the package registers the operators. A process that only serves need not import it: it calls
`torch.ops.load_library(PATH)` with the path of libtorchgraft.so, then `torch.jit.load`.
"""

from ._files import load_module
from ._libraries import cmake_prefix_path as _cmake_prefix_path
from ._libraries import library_path, load_operators
from ._reading import parse_json
from ._text import TextLimits, forward_inputs, text_limits
from .adapter_fusion import (
    add_adapter_fusion,
    fusion_regularization_loss,
    list_adapter_fusions,
    load_adapter_fusion,
    remove_adapter_fusion,
    save_adapter_fusion,
)
from .adapter_hub import AdapterDirectory, load_adapter_directory
from .adapter_setup import load_adapter_setup, save_adapter_setup
from .adapter_training import freeze_adapter, trainable_parameters, unfreeze_adapter
from .checkpoints import load_adapter, match_adapter, save_adapter
from .composition import (
    AdapterCompositionBlock,
    Average,
    BatchSplit,
    Fuse,
    MultiTask,
    Parallel,
    Split,
    Stack,
    compose,
    task_ids,
)
from .configs import (
    AdapterConfig,
    AdapterPlusConfig,
    BnConfig,
    ConfigUnion,
    DiReftConfig,
    DoubleSeqBnConfig,
    DvoRAConfig,
    HoulsbyConfig,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    MTLLoRAConfig,
    NoReftConfig,
    ParallelConfig,
    ParBnConfig,
    PfeifferConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ReftConfig,
    SeqBnConfig,
    UniPELTConfig,
    VeraConfig,
)
from .errors import GraftError, one_line
from .gates import plot_gates
from .grafting import graft, inspect
from .heads import HeadConfig, add_head, head_config, remove_head
from .life import (
    AdapterInfo,
    average_adapter,
    list_adapters,
    lower,
    merge_adapter,
    remove_adapter,
    rename_adapter,
    replace_adapter,
    ungraft,
    unmerge_adapter,
    verify,
)
from .optimization import optimize
from .pool import AdapterPool, Lease, check_room
from .programs.export import export
from .programs.onnx_file import save_onnx
from .programs.package import compile_package, load_banks
from .programs.to_script import from_program
from .quantization import LinearMap, linear_maps, quantization_error, quantize

__version__ = "0.1.0"

load_operators()

# CMAKE_PREFIX_PATH for find_package(torchgraft), as torch.utils.cmake_prefix_path is for torch.
cmake_prefix_path = _cmake_prefix_path()

__all__ = [
    "AdapterCompositionBlock",
    "AdapterConfig",
    "AdapterDirectory",
    "AdapterInfo",
    "AdapterPlusConfig",
    "AdapterPool",
    "Average",
    "BatchSplit",
    "BnConfig",
    "ConfigUnion",
    "DiReftConfig",
    "DoubleSeqBnConfig",
    "DvoRAConfig",
    "Fuse",
    "GraftError",
    "HeadConfig",
    "HoulsbyConfig",
    "Lease",
    "LinearMap",
    "LoRAConfig",
    "LoReftConfig",
    "MAMConfig",
    "MTLLoRAConfig",
    "MultiTask",
    "NoReftConfig",
    "ParBnConfig",
    "Parallel",
    "ParallelConfig",
    "PfeifferConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "ReftConfig",
    "SeqBnConfig",
    "Split",
    "Stack",
    "TextLimits",
    "UniPELTConfig",
    "VeraConfig",
    "add_adapter_fusion",
    "add_head",
    "average_adapter",
    "check_room",
    "cmake_prefix_path",
    "compile_package",
    "compose",
    "export",
    "forward_inputs",
    "freeze_adapter",
    "from_program",
    "fusion_regularization_loss",
    "graft",
    "head_config",
    "inspect",
    "library_path",
    "linear_maps",
    "list_adapter_fusions",
    "list_adapters",
    "load_adapter",
    "load_adapter_directory",
    "load_adapter_fusion",
    "load_adapter_setup",
    "load_banks",
    "load_module",
    "lower",
    "match_adapter",
    "merge_adapter",
    "one_line",
    "optimize",
    "parse_json",
    "plot_gates",
    "quantization_error",
    "quantize",
    "remove_adapter",
    "remove_adapter_fusion",
    "remove_head",
    "rename_adapter",
    "replace_adapter",
    "save_adapter",
    "save_adapter_fusion",
    "save_adapter_setup",
    "save_onnx",
    "task_ids",
    "text_limits",
    "trainable_parameters",
    "unfreeze_adapter",
    "ungraft",
    "unmerge_adapter",
    "verify",
]
