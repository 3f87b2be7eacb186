"""``python -m benchmarks``: results on stdout, progress and errors on stderr.

Exit status: 0 done, 1 something failed, 2 wrong usage (one line on stderr for either).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.machine import ROOT
from benchmarks.report import latency_markdown, latency_plot
from edge_ser.bundle import Bundle
from edge_ser.errors import EdgeSerError

_EXAMPLES = """examples:
  python -m benchmarks latency --weights WEIGHTS
      everything, about six minutes; the tables on stdout
  python -m benchmarks latency --bundles out/default out/tiny --json latency.json
      bundles of your own: with model.onnx in them, full precision as well
  python -m benchmarks latency --threads 1 --runs 10 --plot latency.png
      a first look

What cannot be measured, for want of torch, weights or a graph, says "not measured" and why.
Close other programs: ratios survive a busy machine, milliseconds do not.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        return 0
    except (EdgeSerError, OSError) as exc:
        print(f"benchmarks: {exc}", file=sys.stderr)
    except BrokenProcessPool:
        print("benchmarks: a measuring process died; is the memory full?", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


def _latency(args: argparse.Namespace) -> None:
    from benchmarks.latency import measure

    try:
        bundles = [Bundle.open(bundle) for bundle in args.bundles]
    except EdgeSerError as exc:
        args.usage(f"argument --bundles: {exc}")
    longest_s = min(bundle.metadata.window_s for bundle in bundles)
    if not 0.4 <= args.window <= longest_s:
        args.usage(f"argument --window: {args.window:g}; these bundles hear 0.4 to {longest_s:g} s")
    if args.runs < 1:
        args.usage(f"argument --runs: {args.runs}; allowed: 1 or more")
    measured = {"window_s": args.window, "threads": args.threads, "runs": args.runs}
    result = measure(bundles, args.recipes, args.weights, args.trained, **measured)
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(latency_markdown(result), encoding="utf-8")
    else:
        print(latency_markdown(result), end="")
    if args.plot:
        latency_plot(result, args.plot)


def _existing(text: str) -> Path:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text!r} is not there")
    return Path(text)


def _output(text: str) -> Path:
    if not Path(text).parent.is_dir():  # said now, not after minutes of measuring
        raise argparse.ArgumentTypeError(f"{text!r}: make its folder first")
    return Path(text)


def _threads(text: str) -> list[int]:
    counts = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: different numbers from 1")
    return counts


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; ``--help`` says what is right."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"benchmarks: {message}\n")


def _parser() -> argparse.ArgumentParser:
    teaching: dict[str, Any] = {
        "epilog": _EXAMPLES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    about = "Measure what edge_ser ships."
    parser = _Parser(prog="python -m benchmarks", description=about, **teaching)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    about = "Time torch and ONNX, full precision and INT8, in turns; loading, memory, cold start."
    latency = verbs.add_parser("latency", help=about, description=about, **teaching)
    latency.set_defaults(run=_latency, usage=latency.error)

    def option(name: str, kind: Any, default: Any, metavar: str, text: str, **more: Any) -> None:
        latency.add_argument(name, type=kind, default=default, metavar=metavar, help=text, **more)

    embedded = ["default", "tiny"]
    text = "embedded models or folders (default tiny)"
    option("--bundles", str, embedded, "DIR|NAME", text, nargs="+")
    recipes = ROOT / "export" / "recipes"
    option("--recipes", _existing, recipes, "DIR", "where default.toml is (export/recipes)")
    option("--weights", _existing, None, "DIR", "pretrained checkpoints, for torch default")
    text = "its trained head, model.safetensors of the training stage; else a random one"
    option("--trained", _existing, None, "FILE", text)
    option("--window", float, 3.0, "S", "seconds of audio (3)")
    option("--threads", _threads, [1, 2], "N,N", "numbers of threads (1,2)")
    option("--runs", int, 100, "N", "rounds that count (100)")
    option("--json", _output, None, "FILE", "write all numbers here")
    option("--markdown", _output, None, "FILE", "write the tables here, not on stdout")
    option("--plot", _output, None, "FILE", "draw a bar chart here (PNG, SVG)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
