"""What a result must say about the machine and the software that it was measured on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import edge_ser
from edge_ser.engines import has_vnni
from edge_ser.engines.cuda import Cuda

ROOT = Path(__file__).parent.parent  # the checkout


def provenance(packages: Sequence[str]) -> dict[str, Any]:
    """Return the ``date``, ``commit``, ``machine`` and ``versions`` of a result."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe(),
        "versions": versions(packages),
    }


def describe() -> dict[str, Any]:
    """Return the machine as a JSON object.

    Its ``load_average`` is that of the last minute: 0 where nothing else ran before.
    """
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "vnni": has_vnni(),
        "cores": os.cpu_count(),
        "memory_mb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6),
        "os": platform.platform(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def cpu_model(
    cpuinfo: Path = Path("/proc/cpuinfo"), board: Path = Path("/proc/device-tree/model")
) -> str:
    """Return the name of the processor; on ARM, which does not tell it, that of the board."""
    try:
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
        return board.read_text().strip("\0\n")
    except OSError:
        return platform.processor() or "unknown"


def describe_gpu(release: Path = Path("/etc/nv_tegra_release")) -> dict[str, Any]:
    """Return what is known of the first GPU as a JSON object.

    That is name, compute capability and version of CUDA; the version of the driver where nvidia-smi
    tells it; of a Jetson its release and its power mode.

    Args:
        release: Where a Jetson tells its release.

    Raises:
        EdgeSerError: There is no GPU, or cuda-python is not installed.
    """
    cuda = Cuda()
    found = {"name": cuda.name, "compute_capability": cuda.compute_capability}
    cuda.close()
    from cuda.bindings import runtime

    _, number = runtime.cudaDriverGetVersion()
    found["cuda"] = f"{number // 1000}.{number % 1000 // 10}"
    if release.exists():
        found["release"] = release.read_text().partition("\n")[0]
    for name, words in (
        ("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        ("power_mode", ["nvpmodel", "-q"]),
    ):
        if shutil.which(words[0]):
            done = subprocess.run(words, capture_output=True, text=True)
            found[name] = done.stdout.partition("\n")[0]
    return found


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python, edge_ser and those of the packages that are installed."""
    found = {"python": platform.python_version(), "edge_ser": edge_ser.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: Path = ROOT) -> str:
    """Return the git commit of a checkout, with ``+changes`` where files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+changes" * bool(git("status", "-s"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
