"""Whether the wheel answers on other processors as it does here: 64-bit ARM, and x86 without VNNI.

qemu emulates them (`benchmarks.foreign`). What is asked for are answers; how fast they come says
nothing about a real one.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import foreign, machine
from benchmarks.answers import RESPOND, ask, compare, facts
from benchmarks.pins import resolve
from benchmarks.report import origin, table
from benchmarks.saturation import EXACT, LENGTH, SATURATED, with_seven_bits, write_product
from edge_ser.bundle import Bundle
from edge_ser.engines import has_vnni
from edge_ser.errors import DeviceError
from edge_ser.selftest import TOLERANCE
from export.corpora import Clip, load_corpora
from export.splits import draw, speakers
from export.stage import fingerprint, run_stage

PACKAGES = ("numpy", "onnx", "onnxruntime", "soundfile", "soxr")
LABELS_EQUAL, MEDIAN = 0.99, 1e-3  # asked of ARM against x86, the same graph
SHORTEST_S = 0.4  # that the runtime takes
SEVEN_BITS = "tiny, weights of 7 bits"

HERE, HERE_S8, ARM = "this machine", "this machine, graph of ARM", "ARM"
AVX2, SSE4 = "x86 with AVX2", "x86 with SSE 4.2"
PAIRS = ((ARM, HERE_S8), (ARM, HERE), (SSE4, HERE), (AVX2, HERE))

# Python, the minor version of glibc, and what else must be asked for; JetPack 6 has CUDA 12.
JETPACKS: Mapping[str, tuple[str, int, list[str]]] = {
    "JetPack 6": ("3.10", 35, ["cuda-bindings<13"]),
    "JetPack 7": ("3.12", 39, []),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class System:
    """What answers.

    Attributes:
        command: Runs Python there.
        clips: How many clips it is asked.
        cpu: What is emulated, if anything is.
        machine: Whose graph it takes; None: the runtime chooses.
        in_float: Whether that graph is computed in float, as INT8 kernels would be wrong.
    """

    command: Sequence[str]
    clips: int
    cpu: foreign.Cpu | None = None
    machine: str | None = None
    in_float: bool = False


def measure(corpora: Path, out: Path, bundles: Sequence[str], clips: int, x86_clips: int) -> Row:
    """Let all processors answer, and compare.

    Args:
        corpora: Folder of the corpora.
        out: Keeps the userland and all answers; a run that was stopped goes on with them.
        bundles: Names of embedded bundles, or folders.
        clips: How many clips ARM is asked.
        x86_clips: How many of them other x86 are asked, of which qemu emulates AVX2 very slowly.

    Returns:
        The JSON object that `emulation_markdown` shows.

    Raises:
        CorpusError: There are no corpora, or fewer clips.
        DeviceError: This machine is no x86, or the userland cannot be built.
        EngineError: A process that answers fails.
        MissingDependency: qemu or mmdebstrap is not installed.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise DeviceError(
            f"this machine is {platform.machine()}; answers are compared with x86, run it there"
        )
    foreign.check()
    corpora, out = corpora.resolve(), out.resolve()
    opened = {name: Bundle.open(name) for name in bundles}
    heard = choose(corpora, clips)
    wheel = foreign.build_wheel(out / "wheel")
    own = foreign.own_command()
    systems = {
        HERE: System(own, clips),
        HERE_S8: System(own, clips, machine="aarch64", in_float=not has_vnni()),
        ARM: System(foreign.arm_command(out, wheel), clips, foreign.ARM),
        SSE4: System(foreign.x86_command(out, foreign.SSE4), x86_clips, foreign.SSE4),
        AVX2: System(foreign.x86_command(out, foreign.AVX2), x86_clips, foreign.AVX2),
    }
    write_product(out / "product.onnx")
    runtime = sorted((machine.ROOT / "edge_ser").rglob("*.py"))
    software = {"code": fingerprint([*runtime, RESPOND]), **machine.versions(PACKAGES)}
    tiny = Bundle.open("tiny")
    reads: Row = {"tiny": tiny.metadata, "software": software}
    run_stage(out / "seven_bits", reads, lambda folder: with_seven_bits(tiny, folder))
    opened[SEVEN_BITS] = Bundle.open(out / "seven_bits")
    told, rows = [], []
    for name, bundle in opened.items():
        pairs = PAIRS[-1:] if name == SEVEN_BITS else PAIRS
        found = {}
        for system in [one for one in systems if any(one in pair for pair in pairs)]:
            how = systems[system]
            job = {
                "bundle": name if name in bundles else str(bundle.path),
                "machine": how.machine,
                "float": how.in_float,
                "product": str(out / "product.onnx"),
                "clips": [str(clip.path) for clip in heard[: how.clips]],
            }
            reads = {"job": job, "bundle": bundle.metadata, "software": software, "cpu": how.cpu}
            folder = out / "answers" / bundle.path.name / system
            found[system] = ask(how.command, job, folder, reads)
            row = {"bundle": name, "system": system, "processor": how.cpu and how.cpu.name}
            told.append({**row, **facts(found[system], found[HERE])})
        for a, b in pairs:
            row = compare(found[a][1:], found[b][1:])
            worst = str(Path(row["worst"]).relative_to(corpora))
            rows.append({"bundle": name, "system": a, "against": b, **row, "worst": worst})
    words = f"--bundles {' '.join(bundles)} --clips {clips} --x86-clips {x86_clips}"
    return {
        "schema": 1,
        "benchmark": "emulation",
        "command": f"python -m benchmarks emulate {words}",
        **machine.provenance(PACKAGES),
        "emulator": foreign.emulator_version(foreign.ARM),
        "clips": [str(clip.path.relative_to(corpora)) for clip in heard],
        "speakers": len(speakers(heard)),
        "systems": told,
        "rows": rows,
        "pins": {name: _pins(wheel, *which) for name, which in JETPACKS.items()},
    }


def choose(corpora: Path, count: int) -> tuple[Clip, ...]:
    """Draw clips of all corpora, as evenly over their emotions as there are clips.

    The first of them are spread over corpora and emotions as well. Every draw is the same.
    """
    names = sorted(manifest.parent.name for manifest in corpora.glob("*/manifest.csv"))
    clips = load_corpora(corpora, names)
    return draw([clip for clip in clips if clip.duration_s >= SHORTEST_S], count, seed=0)


def _pins(wheel: Path, python: str, glibc: int, more: Sequence[str]) -> Row:
    where = {"python": python, "glibc": f"2.{glibc}", "asked": ["edge-ser[cpu,tensorrt]", *more]}
    try:
        asked = [f"edge-ser[cpu,tensorrt] @ {wheel.as_uri()}", *more]
        return {**where, "packages": resolve(asked, python, glibc)}
    except DeviceError as exc:
        return {**where, "not_measured": str(exc)}


def emulation_markdown(result: Row) -> str:
    """Return the result of `measure` as Markdown."""
    systems = [_system(row) for row in result["systems"]]
    log = "".join(
        f"- {row['bundle']}, {row['system']}: {line}\n"
        for row in result["systems"] for line in row["log"]
    )  # fmt: skip
    arm = next(row for row in result["systems"] if row["system"] == ARM)
    versions = ", ".join(f"{name} {version}" for name, version in arm["versions"].items())
    same = [row for row in result["rows"] if row["against"] == HERE_S8]
    holds = all(row["labels_equal"] >= LABELS_EQUAL and row["median"] <= MEDIAN for row in same)
    pins = "".join(
        f"- {name} (Python {one['python']}, glibc {one['glibc']}): {_packages(one)}\n"
        for name, one in result["pins"].items()
    )
    return f"""# Answers of emulated processors

{origin(result)} {result["emulator"]}.

`{result["command"]}`: {len(result["clips"])} clips of {result["speakers"]} speakers, drawn evenly \
over the emotions of all corpora; one thread. On ARM: {versions}.

{table(_SYSTEM, systems)}
The self-test is that of the INT8 graph for the machine (allowed: {TOLERANCE:g}); then the runtime \
chooses. The sum is {LENGTH} times 255 x 127: {EXACT} is right, {SATURATED} what is left when \
every two products are added in 16 bits. Times are those of an emulation, not of a processor.

{log}
{table(_ROW, [_row(row) for row in result["rows"]])}
Asked of ARM against the same graph here are {LABELS_EQUAL:.0%} of the labels and a median \
difference of {MEDIAN:g} at most. That holds: {"yes" if holds else "no"}.

What pip takes for `edge-ser[cpu,tensorrt]` on 64-bit ARM; it was not run there:

{pins}"""


_SYSTEM = ["bundle, system", "processor", "VNNI", "self-test off by", "graph chosen", "sum",
           "resampling off by", "s a clip"]  # fmt: skip
_ROW = ["bundle", "system", "against", "clips", "equal labels", "median difference", "largest",
        "in"]  # fmt: skip


def _system(row: Row) -> list[str]:
    return [
        f"{row['bundle']}, {row['system']}", row["processor"] or "not emulated",
        "yes" if row["vnni"] else "no", f"{row['deviation']:.2g}", row["graph"],
        ", ".join(map(str, row["products"])), f"{row['resampled_apart']:.1g}",
        f"{row['clip_s']:.2g}",
    ]  # fmt: skip


def _packages(pins: Row) -> str:
    if reason := pins.get("not_measured"):
        return f"not measured: {reason}"
    return ", ".join(f"{name} {version}" for name, version in pins["packages"].items())


def _row(row: Row) -> list[str]:
    return [
        row["bundle"], row["system"], row["against"], str(row["clips"]),
        f"{row['labels_equal']:.1%}", f"{row['median']:.1e}", f"{row['largest']:.1e}",
        row["worst"],
    ]  # fmt: skip
