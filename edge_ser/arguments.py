"""The words that ``edge-ser`` takes, and what its ``--help`` says."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from edge_ser import __version__
from edge_ser.bundle import GPU_GRAPHS
from edge_ser.engines.providers import PROVIDERS

Verb = Callable[[argparse.Namespace], int]

_EXAMPLES = """examples:
  edge-ser predict --sample              classify the clips that come with the package
  edge-ser predict a.wav b.flac --json   one JSON object a line
  edge-ser predict a.wav --bundle tiny   the small model; or the folder of your own
  edge-ser predict 1.wav 2.wav --speaker anna.json   one speaker, learned from file to file
  arecord -q -t raw -f S16_LE -c 1 -r 16000 | edge-ser listen -     a microphone, live
  edge-ser verify                        is the model complete, and right on this processor?
  edge-ser build --batch 1,8 --window 1,3     TensorRT engines, before a robot needs them
  edge-ser bench --threads 1             how fast is it here?
"""


def _at_least(kind: type, least: float) -> Any:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            whole = "a whole number, " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: {whole}{least:g} or more")
        return value

    return parse


def _list_of(kind: type, least: float) -> Any:
    parse = _at_least(kind, least)
    return lambda text: [parse(part) for part in text.split(",")]


def parser(verbs: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """Return the parser of `edge_ser.cli`; ``verbs`` has what runs each verb, by its name."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="edge-ser",
        description="Speech emotion recognition on the device.",
        epilog=_EXAMPLES,
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"edge-ser {__version__}")
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument(
        "--bundle", default="default", metavar="NAME|DIR", help="embedded model or folder (default)"
    )
    every.add_argument("--json", action="store_true", help="print JSON")
    every.add_argument("--debug", action="store_true", help="print tracebacks as well")
    engine = argparse.ArgumentParser(add_help=False)
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument(
        "--engine", choices=("onnx", "tensorrt"), default="onnx", help="what computes (onnx)"
    )
    engine.add_argument(
        "--precision",
        choices=tuple(GPU_GRAPHS),
        default="int8",
        help="int8 (default) or fp32; fp16 with TensorRT",
    )
    engine.add_argument(
        "--device",
        choices=tuple(PROVIDERS),
        default="cpu",
        help="of ONNX Runtime (cpu); cuda: fp32 and fp16, tensorrt: its own provider for that",
    )
    engine.add_argument(
        "--threads", type=_at_least(int, 1), metavar="N", help="default: one a core"
    )
    engine.add_argument(
        "--fallback",
        choices=("onnx",),
        help="go on with this one, on the processor, where TensorRT fails; it is said when it does",
    )
    several = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, text: str, *parents: argparse.ArgumentParser) -> Any:
        added = several.add_parser(
            name, help=text, description=text, parents=[*parents, every], epilog=_EXAMPLES,
            formatter_class=formatter,
        )  # fmt: skip
        added.set_defaults(run=verbs[name], usage=added.error)
        return added

    predict = verb("predict", "Name the emotion of audio files.", which, engine)
    predict.add_argument("files", nargs="*", metavar="FILE", help="WAV, FLAC, Ogg, MP3, AIFF, AU")
    predict.add_argument(
        "--sample", action="store_true", help="the clips that come with the package"
    )
    predict.add_argument(
        "--speaker",
        metavar="FILE",
        help="all files are of one speaker: adapt to him; what is learned is kept in FILE (numbers "
        "only), and used again when FILE is there",
    )
    listen = verb("listen", "Answer while audio arrives, window by window.", which, engine)
    listen.add_argument(
        "source",
        metavar="SOURCE",
        help="-: the standard input, signed 16-bit little-endian samples at the bundle's rate, one "
        "channel, no header; systemd is told of every answer, where it started this",
    )
    verb("info", "Show what a bundle is.")
    verify = verb("verify", "Check a bundle: hashes, labels, self-test.", which)
    verify.add_argument(
        "--manifest",
        metavar="CSV",
        help="ask for your own clips as well: columns path, and emotion if known; those of "
        "TensorRT are compared with those of the processor",
    )
    build = verb("build", "Build the TensorRT engines of a bundle ahead of their use.")
    build.add_argument(
        "--precision", choices=tuple(GPU_GRAPHS), default="int8", help="of the graph (int8)"
    )
    build.add_argument(
        "--batch", type=_list_of(int, 1), default=[1], metavar="N,N", help="windows at once (1)"
    )
    build.add_argument(
        "--window", type=_list_of(float, 0.4), metavar="S,S", help="seconds (the bundle's)"
    )
    bench = verb("bench", "Measure latency and memory here.", which, engine)
    bench.add_argument("--seconds", type=_at_least(float, 0.4), default=3.0, help="of audio (3)")
    bench.add_argument("--runs", type=_at_least(int, 1), default=200, help="measured runs (200)")
    bench.add_argument(
        "--energy",
        action="store_true",
        help="joules of a run as well: by tegrastats, NVML or RAPL, above idling",
    )
    return parser
