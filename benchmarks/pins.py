"""Which wheels pip takes for a Python and a C library that are not those of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edge_ser.errors import DeviceError

GLIBC_OF_MANYLINUX2014 = 17


def output_of(*command: str) -> str:
    """Run a program and return what it prints.

    Raises:
        DeviceError: It fails; with the last line that it wrote.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it told no reason"]
        raise DeviceError(f"{' '.join(command[:4])} ... failed: {lines[-1]}")
    return done.stdout


def pip(*words: str) -> str:
    """Run pip of this Python; see `output_of`."""
    return output_of(sys.executable, "-m", "pip", *words)


def platform_options(python: str, glibc: int) -> list[str]:
    """Return the options with which pip chooses wheels for Linux on 64-bit ARM.

    Args:
        python: Its version, ``"3.11"``.
        glibc: The minor version of the C library, 36 for 2.36.
    """
    tags = [f"manylinux_2_{minor}" for minor in range(glibc, GLIBC_OF_MANYLINUX2014 - 1, -1)]
    platforms = [f"--platform={tag}_aarch64" for tag in (*tags, "manylinux2014")]
    return [*platforms, f"--python-version={python}", "--implementation=cp", "--only-binary=:all:"]


def resolve(requirements: Sequence[str], python: str, glibc: int) -> dict[str, str]:
    """Return the versions that pip would install there, by package.

    pip judges environment markers by the Python that it runs in; of ours and of what we require
    none differs between the machines that this is asked for.

    Args:
        requirements: As on pip's command line.
        python: See `platform_options`.
        glibc: See `platform_options`.

    Raises:
        DeviceError: pip finds no wheels that fit together, or does not reach its index.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        options = ["--dry-run", "--ignore-installed", f"--report={report}", f"--target={folder}"]
        pip("install", "-q", *options, *platform_options(python, glibc), *requirements)
        found = [one["metadata"] for one in json.loads(report.read_text())["install"]]
    return dict(sorted((one["name"].lower(), one["version"]) for one in found))
