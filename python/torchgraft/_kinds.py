"""Tells what a file is that somebody gives as a model."""

import enum
import zipfile
from pathlib import Path


class Kind(enum.Enum):
    """What a file holds, in the words of an error."""

    SCRIPT = "a TorchScript module"
    PROGRAM = "an exported program of torch.export"
    OLD_PROGRAM = "an exported program of an older torch, whose format this one does not read"
    PACKAGE = "an AOTInductor package"
    PICKLE = "what torch.save() wrote, a state dict or a pickled model"
    SAFETENSORS = "tensors alone, of safetensors"
    ZIP = "a zip archive of another kind"
    UNKNOWN = "of an unknown kind"


# What a member of a zip archive says of it, without the folder that all members are in, by how it begins. The first
# that a member has counts.
_MEMBERS = {
    "data/aotinductor/": Kind.PACKAGE,
    "models/": Kind.PROGRAM,
    "serialized_exported_program.json": Kind.OLD_PROGRAM,
    "constants.pkl": Kind.SCRIPT,
    "data.pkl": Kind.PICKLE,
}
# data/aotinductor/ stood at the top in archives of older torch.
_WITHOUT_FOLDER = ("data/aotinductor/", "serialized_exported_program.json")
_MOST_HEADER_BYTES = 100 << 20  # of safetensors


def kind_of(path: Path) -> Kind:
    """Reads as little as possible of a file.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return _kind_of_bytes(path)
    inner = {name.partition("/")[2] for name in names} | {name for name in names if name.startswith(_WITHOUT_FOLDER)}
    for begin, kind in _MEMBERS.items():
        if any(name.startswith(begin) for name in inner):
            return kind
    return Kind.ZIP


def _kind_of_bytes(path: Path) -> Kind:
    with path.open("rb") as file:
        head = file.read(9)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return Kind.PICKLE  # torch.save() of older releases
    if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MOST_HEADER_BYTES:
        return Kind.SAFETENSORS
    return Kind.UNKNOWN
