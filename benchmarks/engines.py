"""The engines that people leave TorchScript for, and int8: variants of benchmarks/models.py with --engines.

    int8                              the base by torchgraft.quantize(), frozen
    torchgraft, int8                  the grafted module by torchgraft.quantize(), frozen
    int8, oneDNN                      both with weights packed for torch's engine "onednn" instead of its default
    torchgraft, int8, oneDNN
    ONNX Runtime                      the base as an ONNX file
    ONNX Runtime, int8                the same by onnxruntime.quantization.quantize_dynamic, per channel
    torchgraft, ONNX Runtime          the grafted module, lowered, as an ONNX file
    OpenVINO                          the base's file, in float32
    torchgraft, OpenVINO              the grafted module's file
    OpenVINO, bfloat16                where the processor has instructions for bfloat16
    torchgraft, OpenVINO, bfloat16
    AOTInductor                       with --packages: torchgraft.compile_package() of the base
    torchgraft, AOTInductor           and of the grafted module

Every engine gets as many threads as torch has when it is called. Needs the packages of requirements/engines.txt.
"""

import atexit
import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import torchgraft

PREFIX = "torchgraft, "  # of the variants that have the adapter


def missing_packages() -> list[str]:
    names = ("onnx", "onnxscript", "onnxruntime", "openvino")
    return [name for name in names if importlib.util.find_spec(name) is None]


def quantized_module(module: torch.jit.ScriptModule, engine: str) -> torch.jit.ScriptModule:
    """int8 of a module, its weights packed for one of torch's engines."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        return torch.jit.freeze(torchgraft.quantize(module).eval())
    finally:
        torch.backends.quantized.engine = before


class PerThreads:
    """A function that is made anew whenever torch's number of threads has changed."""

    def __init__(self, make: Callable[[int], Callable[..., Tensor]]):
        self._make = make
        self._threads, self._run = 0, None

    def __call__(self, *batch: Tensor) -> Tensor:
        if self._threads != torch.get_num_threads():
            self._threads = torch.get_num_threads()
            self._run = self._make(self._threads)
        return self._run(*batch)


def in_onnx_runtime(file: Path) -> PerThreads:
    import onnxruntime

    def make(threads: int) -> Callable[..., Tensor]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that wait by spinning would take their core from the variant whose turn comes next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]

        def run(*batch: Tensor) -> Tensor:
            feeds = dict(zip(names, with_ids(batch, len(names)), strict=True))
            return torch.from_numpy(session.run(["result"], {name: x.numpy() for name, x in feeds.items()})[0])

        return run

    return PerThreads(make)


def in_openvino(file: Path, precision: str) -> PerThreads:
    """precision: "f32" or "bf16", that of products; inputs and the result keep theirs."""
    import openvino

    model = openvino.Core().read_model(str(file))

    def make(threads: int) -> Callable[..., Tensor]:
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
        compiled = openvino.Core().compile_model(model, "CPU", hints)
        request = compiled.create_infer_request()

        def run(*batch: Tensor) -> Tensor:
            given = with_ids(batch, len(compiled.inputs))
            request.infer([x.numpy() for x in given], share_inputs=True)
            return torch.from_numpy(request.get_tensor("result").data.copy())

        return run

    return PerThreads(make)


def in_package(program: torch.export.ExportedProgram, file: Path) -> PerThreads:
    """Compiles anew for each number of threads, which takes minutes."""
    inputs = len(program.graph_signature.user_inputs)

    def make(threads: int) -> Callable[..., Tensor]:
        path = file.with_name(f"{file.stem}_{threads}.pt2")
        torchgraft.compile_package(program, path)
        package = torch._inductor.aoti_load_package(str(path))
        return lambda *batch: package(*with_ids(batch, inputs))

    return PerThreads(make)


def with_ids(batch: tuple[Tensor, ...], inputs: int) -> tuple[Tensor, ...]:
    """Appends adapter_ids if there is one input more: adapter 0 in every row."""
    if len(batch) == inputs:
        return batch
    return (*batch, torch.zeros(len(batch[0]), dtype=torch.int64))


def has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def variants(
    base: torch.jit.ScriptModule, module: torch.jit.ScriptModule, batch: tuple[Tensor, ...], packages: bool
) -> dict[str, Callable[..., Tensor]]:
    """Makes the variants.

    Args:
        base: traced, in float32.
        module: the base with an adapter.
        batch: inputs of at least two rows and two tokens, for torch.export; other sizes stay open.
        packages: compile AOTInductor packages, too.

    Returns:
        Functions of a batch, by the variant's name.
    """
    result: dict[str, Callable[..., Tensor]] = {}
    # The files are read for each number of threads: the folder stays until the process ends.
    folder = Path(tempfile.mkdtemp(prefix="torchgraft_engines_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for prefix, given in {"": base, PREFIX: module}.items():
        result[f"{prefix}int8"] = quantized_module(given, torch.backends.quantized.engine)
        result[f"{prefix}int8, oneDNN"] = quantized_module(given, "onednn")
        program = torchgraft.export(given, batch, lowered=True)
        file = folder / f"{'grafted' if prefix else 'base'}.onnx"
        torchgraft.save_onnx(program, file)
        result[f"{prefix}ONNX Runtime"] = in_onnx_runtime(file)
        if not prefix:
            result["ONNX Runtime, int8"] = in_onnx_runtime(quantized(file))
        result[f"{prefix}OpenVINO"] = in_openvino(file, "f32")
        if has_bfloat16():
            result[f"{prefix}OpenVINO, bfloat16"] = in_openvino(file, "bf16")
        if packages:
            program = torchgraft.export(given, batch)
            result[f"{prefix}AOTInductor"] = in_package(program, folder / f"{file.stem}_package.pt2")
    return result


def quantized(file: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it recommends steps for images
    made = file.with_name(f"{file.stem}_int8.onnx")
    quantize_dynamic(str(file), str(made), per_channel=True, weight_type=QuantType.QInt8)
    return made
