import sys
from contextlib import closing
from itertools import pairwise

import numpy as np
import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from edge_ser import power
from edge_ser.cli import main
from edge_ser.errors import DeviceError, MissingDependency
from edge_ser.power import Nvml, Rapl, Tegrastats, measure, open_meter, rails_mw, total_rails
from edge_ser.testing import make_bundle

LINES = {
    # Jetson TX2, JetPack 4: henrygd/beszel, pull request 1631
    "tx2": (
        "RAM 3276/7859MB (lfb 5x4MB) SWAP 1626/12122MB (cached 181MB) CPU "
        "[44%@1421,49%@2031,67%@2034,17%@1420,25%@1419,8%@1420] EMC_FREQ 1%@1866 GR3D_FREQ 0%@114 "
        "APE 150 MTS fg 1% bg 1% PLL@42.5C MCPU@42.5C PMIC@50C Tboard@38C GPU@39.5C BCPU@42.5C "
        "thermal@41.3C Tdiode@39.25C VDD_SYS_GPU 182/182 VDD_SYS_SOC 730/730 VDD_4V0_WIFI 0/0 "
        "VDD_IN 5297/5297 VDD_SYS_CPU 1917/1917 VDD_SYS_DDR 1241/1241",
        {"VDD_SYS_GPU": 182, "VDD_SYS_SOC": 730, "VDD_4V0_WIFI": 0, "VDD_IN": 5297,
         "VDD_SYS_CPU": 1917, "VDD_SYS_DDR": 1241},
        5297,
    ),
    # Jetson AGX Xavier, JetPack 4: martinkersner/gtop, pull request 7
    "xavier": (
        "RAM 14700/15692MB (lfb 3x2MB) SWAP 898/8192MB (cached 23MB) CPU "
        "[0%@1190,0%@1190,0%@1190,0%@1190,0%@1190,0%@1190,0%@1190,0%@1190] EMC_FREQ 0% "
        "GR3D_FREQ 0% AO@30C GPU@30.5C Tboard@31C Tdiode@32C AUX@30.5C CPU@31.5C thermal@30.8C "
        "PMIC@100C GPU 463/463 CPU 618/618 SOC 2936/2936 CV 0/0 VDDRQ 309/309 SYS5V 3306/3306",
        {"GPU": 463, "CPU": 618, "SOC": 2936, "CV": 0, "VDDRQ": 309, "SYS5V": 3306},
        7632,
    ),
    # Jetson Orin NX, JetPack 5 (L4T 35.3.1): DataDog/datadog-agent, issue 17678
    "orin nx": (
        "06-16-2023 10:45:09 RAM 6334/15388MB (lfb 1770x4MB) SWAP 491/7694MB (cached 0MB) CPU "
        "[6%@729,9%@729,5%@729,16%@729,off,off,off,off] EMC_FREQ 0%@2133 GR3D_FREQ 0%@611 "
        "GR3D2_FREQ 0%@0 VIC_FREQ 729 APE 174 CV0@45.812C CPU@47.937C SOC2@46.093C SOC0@46.968C "
        "CV1@46.406C GPU@45.875C tj@48.875C SOC1@48.875C CV2@45.75C VDD_IN 5299mW/5299mW "
        "VDD_CPU_GPU_CV 773mW/773mW VDD_SOC 1424mW/1424mW",
        {"VDD_IN": 5299, "VDD_CPU_GPU_CV": 773, "VDD_SOC": 1424},
        5299,
    ),
    # Jetson AGX Orin, JetPack 6: DataDog/datadog-agent, pull request 38102
    "agx orin": (
        "RAM 2448/62840MB (lfb 2x4MB) SWAP 0/31420MB (cached 0MB) CPU [0%@2201,0%@2201,0%@2201,"
        "0%@2201,0%@2201,0%@2201,0%@2201,0%@2201,0%@2201,0%@2201,0%@2201,0%@2201] GR3D_FREQ 0% "
        "cpu@42C soc2@37.843C soc0@39.187C gpu@37.75C tj@42C soc1@37.937C "
        "VDD_GPU_SOC 4940mW/4940mW VDD_CPU_CV 988mW/988mW VIN_SYS_5V0 4442mW/4442mW",
        {"VDD_GPU_SOC": 4940, "VDD_CPU_CV": 988, "VIN_SYS_5V0": 4442},
        10370,
    ),
    # Jetson AGX Thor, JetPack 7.2 (L4T 39.2.0): wendylabsinc/WendyOS, pull request 1316
    "thor": (
        "07-02-2026 13:45:44 RAM 36529/125749MB (lfb 12x4MB) SWAP 11/4096MB (cached 9MB) CPU "
        "[2%@972,1%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,"
        "0%@972,2%@972] cpu@60.406C tj@63.281C soc012@58.468C gpu@62.906C soc345@63.281C "
        "VDD_GPU 37528mW/37528mW/37528mW VDD_CPU_SOC_MSS 18961mW/18961mW/18961mW "
        "VIN_SYS_5V0 18331mW/18331mW/18331mW VIN 87426mW/43713mW/87426mW",
        {"VDD_GPU": 37528, "VDD_CPU_SOC_MSS": 18961, "VIN_SYS_5V0": 18331, "VIN": 87426},
        87426,
    ),
}  # fmt: skip


@pytest.mark.parametrize("board", LINES)
def test_the_rails_of_a_line(board):
    line, rails, total = LINES[board]
    assert rails_mw(line) == rails
    assert sum(rails[name] for name in total_rails(list(rails))) == total


@pytest.mark.parametrize(
    ("rails", "line"),
    [(["VDD_X"], "shows VDD_X; known are VDD_IN, or VIN, or VDD_GPU_SOC"), ([], "run it as root")],
)
def test_unknown_rails_are_refused(rails, line):
    with pytest.raises(DeviceError, match=line):
        total_rails(rails)


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 100)), min_size=2, max_size=8),
    st.floats(0, 1),
)
def test_the_integral_is_that_of_scipy(steps, part):
    times = np.cumsum([step for step, _ in steps])
    watts = [value for _, value in steps]
    until = times[0] + part * (times[-1] - times[0])
    points = times[(times > times[0]) & (times < until)]
    edges = [times[0], *points, until]
    expected = sum(
        quad(lambda at: np.interp(at, times, watts), low, high)[0] for low, high in pairwise(edges)
    )
    assert power.trapezoid(times.tolist(), watts, until) == pytest.approx(expected, abs=1e-6)


class Clock:
    """A clock that only sleeping and working move, and the meter of a machine that warms up."""

    name = "synthetic"

    def __init__(self, noise_w=()):
        self.now, self.total, self.noise_w = 0.0, 0.0, list(noise_w)

    def spend(self, seconds, watts):
        """Let time go by at a power above idling, which rises by a watt in 100 s."""
        self.total += seconds * watts
        self.now += seconds

    def joules(self):
        return self.total + 5 * self.now + self.now**2 / 200

    def close(self):
        pass


def test_what_an_inference_costs_above_idling():
    """A run takes 0.25 s at 8 W above idling: 2 J."""
    machine = Clock()
    found = measure(
        machine, lambda: machine.spend(0.25, 8), blocks=3, block_s=2,
        clock=lambda: machine.now, sleep=lambda s: machine.spend(s, 0),
    )  # fmt: skip
    assert found.joules == pytest.approx(2)
    assert found.standard_error_j == pytest.approx(0, abs=1e-9)
    assert (found.runs, found.blocks, found.meter) == (24, 3, "synthetic")
    assert found.idle_w == pytest.approx(5 + 7 / 100)  # half way through 14 s
    assert found.work_w == pytest.approx(5 + 7 / 100 + 8)


def test_a_meter_that_is_slower_than_a_block_counts_a_run():
    machine = Clock()

    class Slow:
        name = "slow"

        def joules(self):
            machine.now += 3  # until its next line
            return machine.joules()

    found = measure(
        Slow(), lambda: machine.spend(0.5, 8), blocks=2, block_s=2,
        clock=lambda: machine.now, sleep=lambda s: machine.spend(s, 0),
    )  # fmt: skip
    assert found.runs == 2


def test_blocks_that_differ_make_it_uncertain():
    machine, watts = Clock(), iter([8] * 8 + [10] * 8)
    found = measure(
        machine, lambda: machine.spend(0.25, next(watts)), blocks=2, block_s=2,
        clock=lambda: machine.now, sleep=lambda s: machine.spend(s, 0),
    )  # fmt: skip
    assert found.joules == pytest.approx(2.25)
    assert found.standard_error_j == pytest.approx(np.std([2, 2.5], ddof=1) / 2**0.5)


def printing(*lines, forever=True):
    """Return a command that prints lines as tegrastats does, the last one again and again."""
    code = (
        "import sys, time\n"
        "for line in sys.argv[1:]: print(line, flush=True); time.sleep(0.02)\n"
        f"while {forever}: print(sys.argv[-1], flush=True); time.sleep(0.02)\n"
    )
    return [sys.executable, "-c", code, *lines]


def test_tegrastats_is_integrated():
    meter = Tegrastats(printing(LINES["orin nx"][0]))
    try:
        assert meter.name == "tegrastats VDD_IN"
        found = measure(meter, lambda: None, blocks=2, block_s=0.1)
    finally:
        meter.close()
    assert found.idle_w == pytest.approx(5.299, rel=0.02)
    assert found.work_w == pytest.approx(5.299, rel=0.02)
    assert meter._process.poll() is not None


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["no-such-tegrastats"], "'no-such-tegrastats' does not run: No such file"),
        (printing("RAM 1/2MB"), "shows no power rail; run it as root"),
        (printing(LINES["thor"][0], LINES["agx orin"][0]), "shows the rail 'VIN' no more"),
        (printing(LINES["thor"][0], forever=False), "tegrastats ended"),
    ],
)
def test_tegrastats_that_fails(command, line):
    with pytest.raises(DeviceError, match=line), closing(Tegrastats(command)) as meter:
        for _ in range(50):
            meter.joules()


def test_tegrastats_that_falls_silent(monkeypatch):
    monkeypatch.setattr(power, "SILENT_S", 0.3)
    with pytest.raises(DeviceError, match=r"has printed nothing for 0.3 s"):
        Tegrastats([sys.executable, "-c", "import time; time.sleep(60)"])


def zone(folder, number, name, count, largest=999):
    made = folder / f"intel-rapl:{number}"
    made.mkdir(parents=True)
    for file, value in {"name": name, "energy_uj": count, "max_energy_range_uj": largest}.items():
        (made / file).write_text(f"{value}\n")
    return made / "energy_uj"


def test_rapl_adds_packages_and_memory_and_begins_anew(tmp_path):
    package, memory = zone(tmp_path, "0", "package-0", 900), zone(tmp_path, "0:1", "dram", 10)
    core, system = zone(tmp_path, "0:0", "core", 5), zone(tmp_path, "1", "psys", 5)
    meter = Rapl(tmp_path)
    assert meter.joules() == 0
    for file, value in ((package, 100), (memory, 30), (core, 99), (system, 99)):
        file.write_text(str(value))
    assert meter.joules() == pytest.approx((200 + 20) * 1e-6)  # 900 to 999, then 0 to 100
    assert meter.name == "RAPL, 2 counters"


def test_rapl_that_is_not_there_or_hidden(tmp_path):
    with pytest.raises(DeviceError, match="no energy counter in"):
        Rapl(tmp_path)
    counter = zone(tmp_path, "0", "package-0", 900)
    counter.unlink()
    with pytest.raises(DeviceError, match=r"energy_uj' cannot be read \(No such file"):
        Rapl(tmp_path)


class FakeNvml:
    """A GPU that has used 1.5 J more at every look."""

    NVMLError = pynvml.NVMLError

    def __init__(self):
        self.millijoules, self.open = 0, 0

    def nvmlInit(self):  # noqa: N802 (the names are NVML's)
        self.open += 1

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        assert self.open and index == 0
        return "gpu"

    def nvmlDeviceGetName(self, gpu):  # noqa: N802
        return f"the {gpu}"

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):  # noqa: N802
        assert self.open and gpu == "gpu"
        self.millijoules += 1500
        return self.millijoules


def test_nvml_counts(monkeypatch):
    fake = FakeNvml()
    assert all(hasattr(pynvml, name) for name in dir(FakeNvml) if name.startswith("nvml"))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    meter = Nvml()
    before = meter.joules()
    assert meter.joules() - before == pytest.approx(1.5)
    assert meter.name == "NVML the gpu"
    meter.close()
    assert not fake.open


def test_nvml_without_a_driver_or_its_package(monkeypatch):
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with pytest.raises(DeviceError, match="NVML counts no energy here: NVML Shared Library"):
            open_meter("cuda")
    else:
        assert Nvml().joules() > 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingDependency, match=r'pip install "edge-ser\[energy\]"'):
        Nvml()


def test_tegrastats_comes_first(monkeypatch, tmp_path):
    command = printing(LINES["thor"][0])
    script = tmp_path / "tegrastats"
    script.write_text(f"#!/bin/sh\nexec '{command[0]}' -c '{command[2]}' '{command[3]}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    meter = open_meter("cuda")
    meter.close()
    assert meter.name == "tegrastats VIN"


def test_bench_tells_the_energy(monkeypatch, tmp_path, capsys):
    bundle = str(make_bundle(tmp_path / "b"))
    zone(tmp_path / "rapl", "0", "package-0", 900)
    monkeypatch.setattr(power, "_RAPL", tmp_path / "rapl")
    monkeypatch.setattr(Rapl.__init__, "__defaults__", (tmp_path / "rapl",))
    monkeypatch.setattr(measure, "__kwdefaults__", measure.__kwdefaults__ | {"block_s": 0.05})
    assert main(["bench", "--bundle", bundle, "--runs", "2", "--energy"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("0 J a run above idling, standard error 0; 0 W at work, 0 W idle")
    assert last.endswith("(RAPL, 1 counters)")


def test_bench_without_a_meter_says_so(monkeypatch, tmp_path, capsys):
    bundle = str(make_bundle(tmp_path / "b"))
    monkeypatch.setattr(Rapl.__init__, "__defaults__", (tmp_path,))
    assert main(["bench", "--bundle", bundle, "--runs", "2", "--energy"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("edge-ser: no energy counter in")
    assert captured.out == ""
