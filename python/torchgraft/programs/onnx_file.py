"""Writes exported programs as ONNX files. Needs the packages of requirements/onnx.txt."""

import importlib.util
import tempfile
from pathlib import Path

import torch

from .._files import check_writable, write_whole
from ..errors import GraftError
from .description import CUSTOM, description_of, description_text
from .read_program import quiet


def save_onnx(program: torch.export.ExportedProgram, path: str | Path) -> None:
    """Writes a lowered program as an ONNX file, whole or not at all.

    Inputs have the program's names, and outputs are `result` (`result_1`, ... of a tuple) and the names of the gates.
    Open sizes stay open. Banks are initialisers of their own names; the file's metadata has the adapters under
    "torchgraft".

    Args:
        program: what export(..., lowered=True) returns.
        path: the file to write.

    Raises:
        GraftError: a package is missing, the program calls torchgraft's operators, or it has no form in ONNX.
    """
    target = Path(path)
    check_writable(target)
    if any(str(node.target).startswith("torchgraft.") for node in program.graph.nodes):
        raise GraftError("save_onnx: ONNX has no operators of torchgraft; export the module with lowered=True")
    check_packages()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        try:
            with quiet():
                made = torch.onnx.export(program, dynamo=True, verbose=False, output_names=_output_names(program))
        except Exception as error:  # torch.onnx raises errors of many classes
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise GraftError(f"save_onnx: torch.onnx does not take the program ({text})") from error
        if (description := description_text(program)) is not None:
            made.model.metadata_props[CUSTOM] = description
        made.save(str(file), external_data=False)
        write_whole(file.read_bytes(), target)


def check_packages() -> None:
    """Checks that the packages are there.

    Raises:
        GraftError: one is missing.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise GraftError(
                f"save_onnx: there is no package {package}: pip install -r requirements/onnx.txt (in a checkout)"
            )


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    gates = (description_of(program) or {}).get("gate_outputs", [])
    count = len(program.graph_signature.user_outputs) - len(gates)
    return ["result", *(f"result_{index}" for index in range(1, count)), *gates]
