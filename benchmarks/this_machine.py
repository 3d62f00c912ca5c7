"""What the benchmarks ask of the machine that they run on (Linux), and the remarks of libraries that they keep out."""

import logging
import platform
import warnings
from pathlib import Path


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory(field: str) -> int:
    """VmRSS (resident now) or VmHWM (at most, since the process began or reset_peak()) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def silence() -> None:
    """Tracing warns, and the libraries remark upon models that are being put together."""
    warnings.filterwarnings("ignore")
    for name in ("transformers", "adapters"):
        logging.getLogger(name).setLevel(logging.ERROR)
