"""Measures what VeRA and MTL-LoRA cost beside a LoRA of their rank, and a module that holds all three.

    .venv/bin/python benchmarks/lora_factors.py

The model has MiniLM's size. All variants run in turns. The script prints ratios of medians, with the quartiles of the
rounds' own ratios, and the sizes of the files' adapters: VeRA's random matrix is in its file once.
"""

import argparse
import io
import sys

import torch
from rich.table import Table

import models  # puts python/ on the path
import torchgraft
from mixed_batch import measured_rows
from table_console import table_console
from this_machine import silence

SIZES = models.MODELS["MiniLM"]
CONFIGS = {"LoRA": "lora[r=8]", "VeRA": "vera[r=8]", "MTL-LoRA": "mtl_lora[r=8, n_up_projection=3]"}


def _size(module: torch.jit.ScriptModule) -> int:
    file = io.BytesIO()
    torch.jit.save(module, file)
    return file.tell()


def make_variants(rows: int) -> tuple[dict[str, object], dict[str, int]]:
    base = torch.jit.freeze(models.traced(models.Positional(models.hugging_face(SIZES)).eval()))
    alone = {name: torchgraft.graft(base, config, "task", verify=False) for name, config in CONFIGS.items()}
    bank = base
    for index, config in enumerate(CONFIGS.values()):
        bank = torchgraft.graft(bank, config, f"task_{index}", verify=False)
    mixed = torch.arange(rows) % len(CONFIGS)
    variants = {"base": base} | alone | {"all three in one batch": lambda *batch: bank(*batch, adapter_ids=mixed)}
    sizes = {name: _size(module) - _size(base) for name, module in alone.items()}
    return variants, sizes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8x128"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    status = models.run_with_allocator(__file__, sys.argv[1:])
    if status is not None:
        return status
    silence()
    table = Table("rows x tokens", "threads", "variant", "ms", "to the base", "to LoRA", "bytes in its file")
    for shape in arguments.shapes:
        variants, sizes = make_variants(int(shape.split("x")[0]))
        for row in measured_rows(variants, shape, arguments, "LoRA"):
            table.add_row(*row, str(sizes.get(row[2], "")))
    table_console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
