"""Asks Linux about the machine, and silences the remarks of libraries."""

import logging
import platform
import warnings
from pathlib import Path

# malloc keeps the pages of large results. Otherwise the kernel would hand out new pages for each result.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def processor() -> str:
    """Returns the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory(field: str) -> int:
    """Returns the bytes of a field of this process: VmRSS is the resident set now, VmHWM its peak since
    reset_peak()."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Sets VmHWM to the resident set."""
    Path("/proc/self/clear_refs").write_text("5")


def silence() -> None:
    """Switches off the warnings of tracing, and the messages of transformers and adapters about new models."""
    warnings.filterwarnings("ignore")
    for name in ("transformers", "adapters"):
        logging.getLogger(name).setLevel(logging.ERROR)
