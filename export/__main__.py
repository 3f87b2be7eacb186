"""``python -m export``: the command line of model making."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_ser.errors import EdgeSerError

EXAMPLES = """examples:
  python -m export run export/recipes/default.toml --corpora DIR --weights DIR --out DIR
  python -m export run export/recipes/tiny.toml --corpora DIR --weights DIR --out DIR --seeds 0,1,2
  python -m export run export/recipes/default.toml ... --from quantize
  python -m export ablate export/recipes/variants/teacher.toml --corpora DIR ... --seeds 0,1
  python -m export front export/recipes/variants/students.toml --corpora DIR --weights DIR --out DIR
  python -m export quantize MODEL --calibration clips.csv --evaluation test.csv --out DIR

A run that was stopped goes on where it was; a stage whose inputs have not changed is not repeated.
The bundle lies in OUT/NAME/seedN/bundle: edge-ser predict FILE --bundle OUT/NAME/seedN/bundle
"""


OWN = """A CSV file has the columns path and, for evaluation, emotion; speaker and language if they
are known. Paths start at its folder. A quarter of the calibration clips is not calibrated with: one
half of it decides which layers stay float and, where emotions are given, how sure the model may be;
the other half judges where there is no --evaluation.

examples:
  python -m export quantize ./my-wav2vec2 --calibration train.csv --evaluation test.csv --out DIR
  python -m export quantize model.onnx --labels anger,joy,sadness --calibration clips.csv --out DIR
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m export",
        description="Make and certify bundles: speech corpora in, an INT8 bundle out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(dest="verb", required=True)
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--corpora", type=Path, required=True, help="folder with a folder a corpus")
    every.add_argument("--weights", type=Path, help="folder of checkpoints; without it: hub ids")
    every.add_argument("--out", type=Path, required=True, help="where results go, and are kept")
    every.add_argument(
        "--seeds", type=_seeds, default=(0,), help="one or more, such as 0,1,2 (default: 0)"
    )
    every.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def verb(name: str, text: str, file: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            help=f"{text[0].lower()}{text[1:-1]}",
            description=text,
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[every],
        )
        added.add_argument("recipe", type=Path, help=f"a TOML file, such as {file}")
        return added

    run = verb(
        "run", "Run a recipe, from the corpora to the bundle.", "export/recipes/default.toml"
    )
    stages = run.add_mutually_exclusive_group()
    stages.add_argument(
        "--only", metavar="STAGE", help="make this stage again and stop; later ones are forgotten"
    )
    stages.add_argument("--from", dest="start", metavar="STAGE", help="make it and all later again")
    verb(
        "ablate",
        "Score variants of a recipe on speakers that they have not heard.",
        "export/recipes/variants/teacher.toml",
    )
    verb(
        "front",
        "Distil and quantize several students, and draw accuracy against milliseconds.",
        "export/recipes/variants/students.toml",
    )
    verb(
        "languages",
        "Score a recipe on each language after training on the others.",
        "export/recipes/default.toml",
    )
    verb(
        "robustness",
        "Ask a recipe that has been run what small changes of a recording do to its answers.",
        "export/recipes/default.toml",
    )
    _add_quantize(verbs)
    return top


def _add_quantize(verbs: Any) -> None:
    text = "Quantize your own network, and certify what that cost."
    own = verbs.add_parser(
        "quantize",
        help=f"{text[0].lower()}{text[1:-1]}",
        description=text,
        epilog=OWN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own.add_argument("model", help="folder or hub id of transformers, or an ONNX file")
    own.add_argument(
        "--calibration",
        type=Path,
        required=True,
        metavar="CSV",
        help="clips like those to come, not those that it was trained on",
    )
    own.add_argument("--evaluation", type=Path, metavar="CSV", help="labelled clips to score")
    own.add_argument("--out", type=Path, required=True, help="where results go, and are kept")
    own.add_argument("--name", default="", help="of the bundle (default: of the model)")
    own.add_argument(
        "--labels", type=_names, default=(), help="such as anger,joy; an ONNX file needs them"
    )
    own.add_argument("--window", type=float, default=4.0, help="longest input in seconds (4)")
    own.add_argument("--hop", type=float, default=1.0, help="from window to window in seconds (1)")
    own.add_argument(
        "--unpadded",
        action="store_true",
        help="Whisper: hear windows as long as they are, not filled up with silence to 30 s",
    )
    own.add_argument(
        "--any-x86",
        action="store_true",
        help="keep weights so small that INT8 is right, and fast, on x86 without VNNI as well",
    )
    own.add_argument(
        "--allow-uncertified",
        action="store_true",
        help="pack a model that misses the gate; the bundle says so",
    )
    own.add_argument(
        "--json", type=_output, metavar="FILE", help="write the closing table here as well"
    )
    own.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _output(text: str) -> Path:
    if not Path(text).parent.is_dir():  # said now, not after the work
        raise argparse.ArgumentTypeError(f"{text!r}: make its folder first")
    return Path(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if len(set(names)) < max(2, len(names)) or not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: two or more names, such as anger,joy")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: different numbers, such as 0,1,2")
    return seeds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after a failure."""
    args = parser().parse_args(argv)
    try:
        if args.verb == "quantize":
            from export.own import Own, quantize_model
            from export.recipe import Quantize, Windows

            quantize_model(
                Own(
                    args.model, args.calibration, args.evaluation, args.out, args.name,
                    Windows(args.window, args.hop), args.labels, not args.unpadded,
                    Quantize(pairs=args.any_x86), args.allow_uncertified, args.json,
                )
            )  # fmt: skip
            return 0
        places = (args.recipe, args.corpora, args.weights, args.out, args.seeds)
        if args.verb == "ablate":
            from export.ablation import run_ablation

            run_ablation(*places)
        elif args.verb == "front":
            from export.front import run_front

            run_front(*places)
        elif args.verb == "robustness":
            from export.robustness import run_robustness

            run_robustness(*places)
        elif args.verb == "languages":
            from export.languages import run_languages

            run_languages(*places)
        else:
            from export.seeds import run_seeds

            run_seeds(*places, only=args.only, start=args.start)
    except EdgeSerError as exc:
        if args.debug:
            raise
        print(f"export: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("export: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
