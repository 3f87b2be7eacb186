"""Energy of an inference: what the machine draws while it works, less what it draws idle.

A Jetson tells its power through tegrastats, a discrete GPU its energy through NVML, an x86
processor its energy through RAPL. Each is a `Meter`; `measure` does the arithmetic.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_ser.errors import DeviceError, MissingDependency

BLOCKS, BLOCK_S = 5, 4.0
INTERVAL_MS = 100  # between two lines of tegrastats
SILENT_S = 5.0  # without a line, tegrastats is given up

_RAPL = Path("/sys/class/powercap")

# What one rail, or several that do not hold each other, tell of the whole module; the first that is
# there counts. Sources: NVIDIA's Jetson Linux developer guide, power rails of each series; of Thor,
# whose VIN is the input of the board, also rbonghi/jetson_stats, pull request 900.
_TOTALS = (
    ("VDD_IN",),  # TX2, Xavier NX, Orin NX, Orin Nano
    ("VIN",),  # Thor
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
    ("POM_5V_IN",),  # Nano
)

# ``VDD_IN 5299mW/5299mW``: now, the average, and from JetPack 7 on the peak; before JetPack 5
# without a unit. Memory, ``RAM 3276/7859MB``, looks alike.
_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (?:(\d+)mW(?![\w])|(\d+)/\d+(?![\w/]))")


class Meter(Protocol):
    """Counts energy.

    Attributes:
        name: What counts, and what is counted, e.g. ``"tegrastats VDD_IN"``.
    """

    name: str

    def joules(self) -> float:
        """Return the energy in J from some moment, the same for all calls, to this call.

        Raises:
            DeviceError: The meter went away.
        """
        ...

    def close(self) -> None:
        """Stop counting."""
        ...


@dataclass(frozen=True)
class Energy:
    """What an inference costs above idling.

    Attributes:
        meter: What counted.
        joules: Of one inference, the mean over blocks.
        standard_error_j: Of that mean, from how the blocks differ; the error of the sensor itself,
            which no repetition shows, is not in it.
        idle_w: Power between the blocks, the mean.
        work_w: Power in the blocks, the mean, idling included.
        runs: Inferences in all blocks.
        blocks: How many blocks.
    """

    meter: str
    joules: float
    standard_error_j: float
    idle_w: float
    work_w: float
    runs: int
    blocks: int


def measure(
    meter: Meter,
    work: Callable[[], object],
    *,
    blocks: int = BLOCKS,
    block_s: float = BLOCK_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Energy:
    """Measure the energy of an inference.

    Idling and working take turns; from each block of work goes what its duration would have cost at
    the mean power of idling before and behind it, so that a machine that warms up does no harm.

    Args:
        meter: Counts.
        work: One inference.
        blocks: Blocks of work, 2 or more.
        block_s: How long a block lasts at least, and each idling.
        clock: Seconds.
        sleep: Idles for so many seconds.

    Raises:
        DeviceError: The meter went away.
    """
    idle: list[float] = []
    worked: list[tuple[float, float, int]] = []  # joules, seconds, runs
    for block in range(blocks + 1):
        start, before = clock(), meter.joules()
        sleep(block_s)
        end, after = clock(), meter.joules()
        idle.append((after - before) / (end - start))
        if block == blocks:
            break
        runs, start, before = 0, clock(), meter.joules()
        while not runs or clock() - start < block_s:  # a meter may take longer to answer
            work()
            runs += 1
        end, after = clock(), meter.joules()
        worked.append((after - before, end - start, runs))
    each = [
        (joules - seconds * (idle[i] + idle[i + 1]) / 2) / runs
        for i, (joules, seconds, runs) in enumerate(worked)
    ]
    return Energy(
        meter=meter.name,
        joules=statistics.fmean(each),
        standard_error_j=statistics.stdev(each) / len(each) ** 0.5,
        idle_w=statistics.fmean(idle),
        work_w=sum(joules for joules, _, _ in worked) / sum(seconds for _, seconds, _ in worked),
        runs=sum(runs for _, _, runs in worked),
        blocks=blocks,
    )


def trapezoid(times_s: Sequence[float], watts: Sequence[float], until_s: float) -> float:
    """Return the integral in J of power from the first sample to a moment.

    Between two samples the power goes along a straight line.

    Args:
        times_s: Ascending.
        watts: As many.
        until_s: Between the first and the last of the times.
    """
    after = bisect_left(times_s, until_s)
    joules = sum(
        (times_s[i] - times_s[i - 1]) * (watts[i] + watts[i - 1]) / 2 for i in range(1, after)
    )
    if after:
        start, end, low, high = *times_s[after - 1 : after + 1], *watts[after - 1 : after + 1]
        part = until_s - start
        joules += part * (low + (high - low) * part / (end - start) / 2)
    return joules


def open_meter(device: str = "cpu") -> Meter:
    """Return what counts the energy of a device here: tegrastats, else NVML or RAPL.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        DeviceError: Nothing counts it, or it must not be read.
        MissingDependency: NVML is there, its Python package is not.
    """
    if shutil.which("tegrastats"):
        return Tegrastats()
    return Nvml() if device == "cuda" else Rapl()


def rails_mw(line: str) -> dict[str, int]:
    """Return the power now in mW of every rail in a line of tegrastats (JetPack 4 to 7)."""
    return {name: int(unit or bare) for name, unit, bare in _RAIL.findall(line)}


def total_rails(rails: Sequence[str]) -> tuple[str, ...]:
    """Return the rails whose sum is what the module draws.

    Raises:
        DeviceError: None of those that are known are among them.
    """
    for known in _TOTALS:
        if set(known) <= set(rails):
            return known
    got = ", ".join(rails) or "no power rail; run it as root, some boards hide them"
    raise DeviceError(
        f"tegrastats shows {got}; known are {', or '.join(' + '.join(known) for known in _TOTALS)}"
    )


class Tegrastats:
    """The module's power, a line of tegrastats at a time."""

    def __init__(self, command: Sequence[str] = ("tegrastats", "--interval", str(INTERVAL_MS))):
        """Start it.

        Args:
            command: What prints the lines.

        Raises:
            DeviceError: It does not run, or shows no power rail that is known.
        """
        self._times: list[float] = []
        self._watts: list[float] = []
        self._rails: tuple[str, ...] = ()
        self._failed: DeviceError | None = None
        self._news = threading.Condition()
        try:
            self._process = subprocess.Popen(
                list(command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError as exc:
            raise DeviceError(f"{command[0]!r} does not run: {exc.strerror}") from exc
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.joules()
        except DeviceError:
            self.close()
            raise
        self.name = f"tegrastats {' + '.join(self._rails)}"

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            rails = rails_mw(line)
            with self._news:
                try:
                    self._rails = self._rails or total_rails(list(rails))
                    watts = sum(rails[name] for name in self._rails) / 1e3
                except DeviceError as exc:
                    self._failed = exc
                except KeyError as exc:
                    self._failed = DeviceError(f"tegrastats shows the rail {exc} no more")
                else:
                    self._times.append(time.monotonic())
                    self._watts.append(watts)
                self._news.notify_all()
                if self._failed:
                    return
        with self._news:
            self._failed = DeviceError("tegrastats ended; is it there, and may this user run it?")
            self._news.notify_all()

    def joules(self) -> float:
        """Return the energy since the first line; see `Meter`. Waits for the next line."""
        now = time.monotonic()
        with self._news:
            fresh = self._news.wait_for(
                lambda: self._failed or (self._times and self._times[-1] >= now), SILENT_S
            )
            if self._failed:
                raise self._failed
            if not fresh:
                raise DeviceError(f"tegrastats has printed nothing for {SILENT_S:g} s")
            return trapezoid(self._times, self._watts, max(now, self._times[0]))

    def close(self) -> None:
        """End it; see `Meter`."""
        self._process.kill()
        self._reader.join()
        with self._process:  # its pipe is closed as well
            pass


class Nvml:
    """The first discrete GPU, which counts millijoules itself (Volta and later)."""

    def __init__(self) -> None:
        """Find it.

        Raises:
            DeviceError: There is none, or it does not count.
            MissingDependency: The package is not installed.
        """
        try:
            import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as exc:
            line = 'nvidia-ml-py is not installed; run: pip install "edge-ser[energy]"'
            raise MissingDependency(line) from exc
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.name = f"NVML {pynvml.nvmlDeviceGetName(self._gpu)}"
        except pynvml.NVMLError as exc:
            raise DeviceError(f"NVML counts no energy here: {exc}") from exc
        self.joules()

    def joules(self) -> float:
        """Return the energy since the driver was loaded; see `Meter`."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1e3
        except self._nvml.NVMLError as exc:
            raise DeviceError(f"NVML counts no energy here: {exc}") from exc

    def close(self) -> None:
        """Let NVML go; see `Meter`."""
        self._nvml.nvmlShutdown()


class Rapl:
    """The packages of an x86 processor and their memory, which count microjoules themselves."""

    def __init__(self, folder: Path = _RAPL) -> None:
        """Find the counters.

        Args:
            folder: Of Linux's power capping.

        Raises:
            DeviceError: There are none, or this user must not read them.
        """
        zones = sorted(folder.glob("intel-rapl:*"))  # of AMD's processors as well
        self._counters = [
            (zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()))
            for zone in zones
            if (zone / "name").read_text().startswith(("package", "dram"))
        ]
        if not self._counters:
            raise DeviceError(
                f"no energy counter in {str(folder)!r}; energy needs tegrastats (Jetson), NVML "
                "(--device cuda) or RAPL (x86, not in most virtual machines)"
            )
        self.name = f"RAPL, {len(self._counters)} counters"
        self._total_uj = 0
        self._last = [self._count(file) for file, _ in self._counters]

    def joules(self) -> float:
        """Return the energy since the first call; see `Meter`. Call it once a minute at least."""
        for i, (file, largest) in enumerate(self._counters):
            count = self._count(file)
            self._total_uj += (count - self._last[i]) % (largest + 1)  # it begins anew at 0
            self._last[i] = count
        return self._total_uj / 1e6

    def close(self) -> None:
        """Nothing is held; see `Meter`."""

    @staticmethod
    def _count(file: Path) -> int:
        try:
            return int(file.read_text())
        except OSError as exc:
            line = f"{str(file)!r} cannot be read ({exc.strerror}); run as root, or: chmod a+r it"
            raise DeviceError(line) from exc
