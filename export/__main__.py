"""``python -m export``: the command line of model making."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_ser.errors import EdgeSerError

EXAMPLES = """examples:
  python -m export run export/recipes/default.toml --corpora DIR --weights DIR --out DIR
  python -m export run export/recipes/tiny.toml --corpora DIR --weights DIR --out DIR --seeds 0,1,2
  python -m export run export/recipes/default.toml ... --from quantize
  python -m export ablate export/recipes/variants/teacher.toml --corpora DIR ... --seeds 0,1
  python -m export front export/recipes/variants/students.toml --corpora DIR --weights DIR --out DIR

A run that was stopped goes on where it was; a stage whose inputs have not changed is not repeated.
The bundle lies in OUT/NAME/seedN/bundle: edge-ser predict FILE --bundle OUT/NAME/seedN/bundle
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
    return top


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
    places = (args.recipe, args.corpora, args.weights, args.out, args.seeds)
    try:
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
