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
from typing import Any

from benchmarks import report
from benchmarks.machine import ROOT
from edge_ser.bundle import Bundle
from edge_ser.errors import BundleError, EdgeSerError

_EXAMPLES = """examples:
  python -m benchmarks latency --weights WEIGHTS
      everything, about five minutes; the table on stdout
  python -m benchmarks latency --bundles out/default out/tiny --threads 1 --json latency.json
      bundles of your own (with model.onnx, full precision too), one thread
  python -m benchmarks report latency.json --plot latency.png
      the table and the plot once more, from the numbers

Systems that lack something, torch or weights, say "not measured" and why. Close other programs:
ratios survive a busy machine, milliseconds do not.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = _parser().parse_args(argv)
    try:
        result = args.result(args)
        if args.json:
            args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
        text = report.latency_markdown(result)
        if args.markdown:
            args.markdown.write_text(text, encoding="utf-8")
        else:
            print(text, end="")
        if args.plot:
            report.latency_plot(result, args.plot)
        return 0
    except (EdgeSerError, OSError) as exc:
        print(f"benchmarks: {exc}", file=sys.stderr)
    except BrokenProcessPool:
        print("benchmarks: a measuring process died; is the memory full?", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


def _latency(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.latency import TorchDefault, measure

    for bundle in args.bundles:
        longest_s = bundle.metadata.window_s
        if args.window > longest_s:
            name = bundle.metadata.name
            args.usage(f"--window {args.window:g}: bundle {name!r} hears at most {longest_s:g} s")
    return measure(
        args.bundles,
        TorchDefault(args.recipes, args.weights, args.trained),
        window_s=args.window,
        threads=args.threads,
        runs=args.runs,
    )


def _read(args: argparse.Namespace) -> dict[str, Any]:
    try:
        return report.check(json.loads(args.file.read_text(encoding="utf-8")))
    except ValueError as exc:
        raise EdgeSerError(f"{str(args.file)!r} is not JSON ({exc})") from exc


def _bundle(text: str) -> Bundle:
    try:
        return Bundle.open(text)
    except BundleError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _existing(text: str) -> Path:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text!r} is not there")
    return Path(text).resolve()


def _output(text: str) -> Path:
    if not Path(text).parent.is_dir():  # said now, not after minutes of measuring
        raise argparse.ArgumentTypeError(f"{text!r}: its folder is not there; make it first")
    return Path(text)


def _threads(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: different numbers from 1, as 1,2")
    return counts


def _at_least(kind: type, least: float) -> Any:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: {least:g} or more")
        return value

    return parse


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is in ``--help``."""

    def error(self, message: str) -> Any:
        self.exit(2, f"benchmarks: {message}\n")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="python -m benchmarks",
        description="Measure what edge_ser ships.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    shown = argparse.ArgumentParser(add_help=False)
    shown.add_argument("--json", type=_output, metavar="FILE", help="write the numbers here")
    shown.add_argument(
        "--markdown", type=_output, metavar="FILE", help="write the tables here, not on stdout"
    )
    shown.add_argument("--plot", type=_output, metavar="FILE", help="draw a bar chart (PNG, SVG)")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, result: Any, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name, help=text, description=text, parents=[shown], epilog=_EXAMPLES,
            formatter_class=raw,
        )  # fmt: skip
        added.set_defaults(result=result, usage=added.error)
        return added

    latency = verb(
        "latency",
        _latency,
        "Time torch and ONNX, full precision and INT8, in turns; load time, memory, cold start.",
    )
    latency.add_argument(
        "--bundles", nargs="+", type=_bundle, metavar="NAME|DIR",
        help="embedded models or folders (default tiny); the first is started cold",
    )  # fmt: skip
    latency.add_argument(
        "--recipes", type=_existing, default=ROOT / "export" / "recipes", metavar="DIR",
        help="where default.toml lies (export/recipes)",
    )  # fmt: skip
    latency.add_argument(
        "--weights", type=_existing, metavar="DIR",
        help="pretrained checkpoints; without them torch default is not measured",
    )  # fmt: skip
    latency.add_argument(
        "--trained", type=_existing, metavar="FILE",
        help="model.safetensors of the training stage of default; else its head is random",
    )  # fmt: skip
    latency.add_argument(
        "--window", type=_at_least(float, 0.4), default=3.0, metavar="S", help="seconds (3)"
    )
    latency.add_argument(
        "--threads", type=_threads, default=[1, 2], metavar="N,N", help="numbers of threads (1,2)"
    )
    latency.add_argument(
        "--runs", type=_at_least(int, 1), default=100, metavar="N", help="rounds that count (100)"
    )
    again = verb("report", _read, "Show a result once more.")
    again.add_argument("file", type=_existing, metavar="FILE", help="what --json wrote")
    return parser


if __name__ == "__main__":
    sys.exit(main())
