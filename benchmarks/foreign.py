"""Processors that this machine is not, by qemu's user emulation, and what runs on them.

For ARM that is Debian's Python and wheels from the index; nothing of it is installed on this
machine, and nothing needs a chroot or binfmt: qemu takes every file that the emulated program opens
from a folder first. So the folder also holds a ``/proc/cpuinfo`` that fits the processor: the
machine's own would tell the runtime what the emulated one cannot do.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.pins import output_of, pip, platform_options
from edge_ser.errors import MissingDependency
from export.stage import fingerprint, run_stage

SUITE, GLIBC, PYTHON = "bookworm", 36, "3.11"  # Debian 12
PACKAGES = (f"python{PYTHON}", "libstdc++6")
INSTALL = "apt-get install qemu-user-static mmdebstrap debian-archive-keyring"


@dataclass(frozen=True)
class Cpu:
    """A processor that qemu emulates.

    Attributes:
        name: What qemu calls it.
        machine: As `platform.machine` names it.
        lacks: What qemu would say at every start that it does not emulate.
        cpuinfo: What the kernel would say of it, as far as that is read.
    """

    name: str
    machine: str
    lacks: tuple[str, ...]
    cpuinfo: str


# A Jetson Orin has Cortex-A78AE, with the same instructions for INT8 (dot products) and half.
ARM = Cpu(
    "cortex-a76", "aarch64", (),
    "processor\t: 0\nFeatures\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid "
    "asimdrdm lrcpc dcpop asimddp ssbs\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    "CPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n\n",
)  # fmt: skip
AVX2 = Cpu(
    "Haswell-noTSX", "x86_64", ("pcid", "invpcid", "x2apic", "tsc-deadline"),
    "processor\t: 0\nmodel name\t: Intel Core Processor (Haswell, no TSX)\n"
    "flags\t\t: fpu sse sse2 pni ssse3 sse4_1 sse4_2 popcnt avx f16c fma bmi1 avx2 bmi2\n\n",
)  # fmt: skip
SSE4 = Cpu(
    "Nehalem", "x86_64", (),
    "processor\t: 0\nmodel name\t: Intel Core i7 9xx (Nehalem Class Core i7)\n"
    "flags\t\t: fpu sse sse2 pni ssse3 sse4_1 sse4_2 popcnt\n\n",
)  # fmt: skip


def check() -> None:
    """Look for the programs that are needed.

    Raises:
        MissingDependency: One is not installed.
    """
    for cpu in (ARM, AVX2):
        emulator(cpu)
    if shutil.which("mmdebstrap") is None:
        raise MissingDependency(f"mmdebstrap is not installed; run: {INSTALL}")


def emulator(cpu: Cpu) -> str:
    """Return the program that emulates a processor.

    Raises:
        MissingDependency: It is not installed.
    """
    names = (f"qemu-{cpu.machine}-static", f"qemu-{cpu.machine}")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise MissingDependency(f"{names[0]} is not installed; run: {INSTALL}")
    return found


def emulator_version(cpu: Cpu) -> str:
    """Return the first line of what the emulator says of itself."""
    return output_of(emulator(cpu), "--version").partition("\n")[0]


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout; the same files make the same wheel."""
    shutil.rmtree(folder, ignore_errors=True)
    pip("wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


def arm_command(out: Path, wheel: Path) -> list[str]:
    """Return what runs Python with the wheel on emulated ARM; build that if it is not there.

    Args:
        out: Keeps the userland and the wheels.
        wheel: Of edge_ser.

    Raises:
        DeviceError: Packages or wheels cannot be had.
    """
    root, site = out / "debian", out / "wheels"

    def unpack(folder: Path) -> None:
        shutil.rmtree(folder / "root", ignore_errors=True)  # of a run that was stopped
        output_of(
            "mmdebstrap", "--mode=chrootless", "--variant=extract", "--architectures=arm64",
            f"--include={','.join(PACKAGES)}", SUITE, str(folder / "root"),
        )  # fmt: skip
        _pretend(ARM, folder / "root")

    def install(folder: Path) -> None:
        target = folder / "site"
        shutil.rmtree(target, ignore_errors=True)
        options = platform_options(PYTHON, GLIBC)
        pip("install", "-q", f"--target={target}", *options, f"edge-ser[cpu] @ {wheel.as_uri()}")

    reads = {"suite": SUITE, "packages": PACKAGES, "cpu": ARM}
    run_stage(root, reads, unpack)
    run_stage(site, {"wheel": fingerprint([wheel]), "python": PYTHON, "glibc": GLIBC}, install)
    python = root / "root" / "usr" / "bin" / f"python{PYTHON}"
    # -S: what the root does not hold is looked for on this machine, whose packages are not meant.
    program = [emulator(ARM), "-cpu", ARM.name, "-L", str(root / "root"), str(python), "-S", "-B"]
    return ["env", f"PYTHONPATH={site / 'site'}", *program]


def x86_command(out: Path, cpu: Cpu) -> list[str]:
    """Return what runs this Python, with its packages and this checkout, on another x86.

    Args:
        out: Takes what the kernel would tell.
        cpu: The processor.
    """
    _pretend(cpu, out / cpu.name)
    model = ",-".join([cpu.name, *cpu.lacks])
    program = [emulator(cpu), "-cpu", model, "-L", str(out / cpu.name), sys.executable, "-B"]
    return ["env", f"PYTHONPATH={ROOT}", *program]


def own_command() -> list[str]:
    """Return what runs this Python on this processor."""
    return ["env", f"PYTHONPATH={ROOT}", sys.executable, "-B"]


def _pretend(cpu: Cpu, root: Path) -> None:
    """Write what the kernel would tell about a machine with one such processor."""
    files = {"proc/cpuinfo": cpu.cpuinfo}
    files |= {
        f"sys/devices/system/cpu/{name}": "0\n"
        for name in ("kernel_max", "online", "possible", "present")
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
