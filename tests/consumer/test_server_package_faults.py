"""examples/server refuses a package that cannot be served before it loads the package's code, which is missing here."""

import json
from pathlib import Path

import pytest
import torch

import torchgraft
from hosts_support import attempt, package_without_code
from server_support import MOST_TOKENS

LIMITED = [2, MOST_TOKENS]
SIZES = [
    {"name": "input_ids", "dtype": "int64", "sizes": [[2, None], LIMITED]},
    {"name": "attention_mask", "dtype": "int64", "sizes": [[2, None], LIMITED]},
    {"name": "adapter_ids", "dtype": "int64", "sizes": [[2, None]]},
]


def description(inputs: list | None = None, **package: object) -> dict:
    """That of a good package, but for what is given."""
    versions = {"torch": torch.__version__, "torchgraft": torchgraft.__version__}
    return {
        "adapters": [],
        "pool": {"capacity": 3, "base": "", "room": [{"config": {"architecture": "lora", "r": 2}}]},
        "package": versions | {"banks": [], "inputs": SIZES if inputs is None else inputs} | package,
    }


def sized(rows: list, tokens: list) -> list:
    return [{**each, "sizes": [rows, tokens][: len(each["sizes"])]} for each in SIZES]


FAULTS: dict[str, tuple[object, list, str]] = {
    "no zip": (b"not a package", [], "); make it anew: torchgraft export"),
    "of others": (None, [], "a package that torchgraft has not made"),
    "fixed adapters": ({"adapters": [], "adapter_ids": True}, [], "its adapters are fixed"),
    "damaged": (b"{", [], "not JSON"),
    "no rows": (description() | {"pool": {}}, [], "a damaged description (key 'capacity' not found)"),
    "another torch": (description(torch="2.99.0"), [], "compiled by torch 2.99.0, and this server runs with 2."),
    "another torchgraft": (description(torchgraft="9.0"), [], "compiled with torchgraft 9.0, and this server has"),
    "static": (description(sized([2, 2], [7, 7])), [], "input_ids of 2 rows only; make it anew"),
    "few rows": (
        description(sized([2, 8], LIMITED)),
        [],
        "takes at most 8 rows, and the server's limit is 64; give --max-batch 8",
    ),
    "few tokens": (
        description(sized([2, None], [2, 9])),
        [],
        f"takes at most 9 tokens, and the server's limit is {MOST_TOKENS}; give --max-tokens 9",
    ),
    "other inputs": (
        description(SIZES[2:] * 2),
        [],
        "takes adapter_ids with 1 dimensions, expected [rows, tokens]; make it anew",
    ),
    "other capacity": (description(), ["--capacity", 4], "--capacity: the package has rows for 3 adapters, got 4"),
    "compositions": (description(), ["--max-compositions", 2], "--max-compositions: a package runs no compositions"),
    "other pooling": (
        description()
        | {
            "pool": {
                "capacity": 3,
                "base": "",
                "room": [{"config": {"architecture": "lora", "r": 2, "use_gating": True}}],
            }
        },
        ["--gate-pooling", "unpadded"],
        "--gate-pooling: the package's gates are means over all tokens, got unpadded",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_package_is_refused_in_one_line(case: str, server_program: Path, models: Path, tmp_path: Path) -> None:
    content, options, message = FAULTS[case]
    path = tmp_path / "given.aoti.pt2"
    if case == "no zip":
        path.write_bytes(content)
    else:
        text = content.decode() if isinstance(content, bytes) else json.dumps(content)
        package_without_code(path, {} if content is None else {"torchgraft": text})
    given = ["--adapters", models / "adapters", "--port", 0, "--package", path, *options]
    done = attempt(server_program, models / "base.pt", *given)
    assert done.returncode in (1, 2) and done.stderr.splitlines()[-1].startswith("server: ")
    assert message in done.stderr.splitlines()[-1], done.stderr
