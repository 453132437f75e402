"""How much memory this process takes, and how much there is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path


def anonymous_memory() -> int:
    """Bytes that no file backs (RssAnon), 0 where the system does not tell."""
    return _status("RssAnon")


def peak_memory() -> int:
    """The most bytes that the process ever had resident, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """Bytes that can be had without swapping, within the limit of a container."""
    system = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        system = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), system)
    with contextlib.suppress(OSError, ValueError):  # there is none where the file is absent or says "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        system = min(system, max(limit - used, 0))
    return system


def trim() -> None:
    """Have the allocator give freed memory back to the system, where it can be told to."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
