"""``python -m benchmarks``: results on stdout, progress and errors on stderr.

Exit status: 0 done, 1 something failed, 2 wrong usage (one line on stderr for either).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from benchmarks import arguments as read
from benchmarks.arguments import option
from benchmarks.foreign import INSTALL
from benchmarks.machine import ROOT
from benchmarks.report import (
    accuracy_plot,
    latency_markdown,
    latency_plot,
    peers_markdown,
    peers_plot,
)
from edge_ser.bundle import Bundle
from edge_ser.errors import EdgeSerError

AUDIO = (".wav", ".flac", ".ogg", ".mp3")
SYNTHETIC = 8  # windows whose answers are compared where no clips are given

_LATENCY = """examples:
  python -m benchmarks latency --weights WEIGHTS
      everything, about six minutes; the tables on stdout
  python -m benchmarks latency --bundles out/default out/tiny --json latency.json
      bundles of your own: with model.onnx in them, full precision as well
  python -m benchmarks latency --threads 1 --runs 10 --plot latency.png
      a first look

What cannot be measured, for want of torch, weights or a graph, says "not measured" and why.
Close other programs: ratios survive a busy machine, milliseconds do not.
"""

_PEERS = """A peer whose package is missing says "not measured" and how to install it: all are in
pip install -e ".[peers]". The graphs stay in --out and are made again only when they must be. A
run that was stopped goes on behind what it has measured.

examples:
  python -m benchmarks peers ./my-wav2vec2 --calibration train.csv --clips speech --out DIR
      what each tool makes of your network: time, size, memory, equal answers
  python -m benchmarks peers --random base --out DIR --threads 1 --runs 5
      time, size and memory of a network of that size, without a checkpoint

Close other programs: ratios survive a busy machine, milliseconds do not.
"""

_GPU = """A cell that cannot be measured says why. FOLDER: of a run, of a bundle, of graphs that are
called as in a bundle, or a checkpoint of transformers. Without one a network of the same shape has
random weights, enough for times; the INT8 models that are embedded are trained.

From nothing, on a machine with a GPU (a Jetson has TensorRT already, of JetPack; its environment is
made with --system-site-packages). Without torch there, run it with --prepare elsewhere first, and
copy DIR:
  pip install -e ".[export,bench,tensorrt]" tensorrt
  python -m benchmarks gpu --out DIR --json gpu.json --markdown gpu.md --plot gpu.png

examples:
  python -m benchmarks gpu tiny --out DIR --runtimes tensorrt,onnxruntime --batches 1
      a first look
  python -m benchmarks gpu default=RUN/default/seed2 --weights WEIGHTS --manifest CSV --out DIR
      what precision and runtime do to the answers of a trained model

Stopped, it goes on where it was; cells that failed are tried again.
"""

_MATCH = """For want of a fine-tuned checkpoint. OUT takes the checkpoint, whose matching.json says
how near it came, and speech to calibrate with and to compare answers on.

examples:
  python -m benchmarks match export/recipes/default.toml --corpora DIR --weights DIR --out OUT
      an hour of processor time
  python -m benchmarks peers OUT/wav2vec2_matched \\
      --calibration OUT/speech/calibration/manifest.csv --clips OUT/speech/clips --out PEERS
      what quantization does to it
"""

_ACCURACY = """Heads come from python -m export run RECIPE with the same --out and --seed. Graphs
and answers stay there, and are made again only when they must be.

examples:
  python -m benchmarks accuracy export/recipes/default.toml --corpora DIR --weights DIR --out DIR
      INT8 and other tools against full precision, at other lengths, levels and with noise
  python -m benchmarks accuracy export/recipes/default.toml ... \\
      --variants export/recipes/variants/quantize.toml
      what each step of the quantizer is worth
"""

_EMULATE = f"""Debian and Ubuntu have what it needs: {INSTALL}
The userland (80 MB), wheels for ARM (170 MB) and all answers stay in --out; a run that was stopped
goes on with them. qemu is slow at the float arithmetic of AVX2: most of the time goes there.

examples:
  python -m benchmarks emulate --corpora DIR --out DIR
      the embedded models on ARM and on x86 without VNNI, against this machine
  python -m benchmarks emulate --corpora DIR --out DIR --bundles out/mine --clips 20 --x86-clips 1
      a bundle of your own, a first look
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
    _show(args, result, latency_markdown, latency_plot)


def _peers(args: argparse.Namespace) -> None:
    from benchmarks.peers import measure
    from benchmarks.prepare import calibration_windows, prepare, random_checkpoint
    from benchmarks.subjects import read_windows, synthetic_speech

    if (args.checkpoint is None) == (args.random is None):
        args.usage("one of CHECKPOINT and --random is needed")
    if args.runs < 1:
        args.usage(f"argument --runs: {args.runs}; allowed: 1 or more")
    files = sorted(f for f in args.clips.iterdir() if f.suffix in AUDIO) if args.clips else []
    if args.clips and not files:
        args.usage(f"argument --clips: no {', '.join(AUDIO)} in '{args.clips}'")
    args.out.mkdir(exist_ok=True)
    if files:
        clips = {seconds: read_windows(files, seconds) for seconds in args.windows}
    else:
        clips = {seconds: synthetic_speech(SYNTHETIC, seconds, seed=2) for seconds in args.windows}
    calibration = calibration_windows(args.calibration)
    checkpoint = args.checkpoint or random_checkpoint(args.random, args.out)
    prepared = prepare(checkpoint, calibration, args.out, random=bool(args.random))
    heard = "speech" if args.calibration else "synthetic sounds"
    subject = {
        "network": f"random {args.random}" if args.random else checkpoint.name,
        "calibration": f"Calibrated with {len(calibration)} windows of 3 s of {heard}.",
        "agreement": "Agreement is on speech." if files else "Agreement is on synthetic sounds.",
    }
    if args.random:
        subject["agreement"] = (
            "Random weights: latency, size and memory only; agreement means nothing."
        )
    home = args.out / "measured"
    result = measure(prepared, clips, home, threads=args.threads, runs=args.runs)
    _show(args, {**result, "subject": subject}, peers_markdown, peers_plot)
    shutil.rmtree(home)  # it is for runs that are stopped: the next one measures anew


def _gpu(args: argparse.Namespace) -> None:
    from benchmarks.gpu import measure
    from benchmarks.gpu_report import gpu_markdown, gpu_plot
    from benchmarks.networks import model_of

    names = [name for name, _ in args.models]
    if len(set(names)) < len(names):
        args.usage(f"argument MODEL: {', '.join(names)}; allowed: different names")
    args.out.mkdir(exist_ok=True)
    models = [model_of(name, folder, args.out, args.weights) for name, folder in args.models]
    if args.prepare:
        for model in models:
            for precision, graph in model.graphs.items():
                found = f"not made: {graph}" if isinstance(graph, str) else graph.file
                print(f"{model.name} {precision}: {found}")
        return
    kinds = ("runtimes", "batches", "window_s", "runs", "manifest", "longest_s")
    result = measure(models, args.out, **{name: getattr(args, name) for name in kinds})
    _show(args, result, gpu_markdown, gpu_plot)


def _accuracy(args: argparse.Namespace) -> None:
    from benchmarks.accuracy import accuracy_markdown, measure
    from benchmarks.unheard import PEERS

    places = (args.recipe, args.corpora, args.weights, args.out)
    tools = PEERS if args.tools is None else [one for one in args.tools.split(",") if one]
    if unknown := [name for name in tools if name not in PEERS]:
        args.usage(f"argument --tools: {unknown[0]!r}; allowed: {', '.join(PEERS)}")
    result = measure(*places, args.seed, args.variants, tools)
    _show(args, result, accuracy_markdown, accuracy_plot)


def _emulate(args: argparse.Namespace) -> None:
    from benchmarks.emulate import emulation_markdown, measure

    if not 1 <= args.x86_clips <= args.clips:
        args.usage(f"argument --x86-clips: {args.x86_clips}; allowed: 1 to --clips, {args.clips}")
    args.out.mkdir(exist_ok=True)
    result = measure(args.corpora, args.out, args.bundles, args.clips, args.x86_clips)
    _show(args, result, emulation_markdown, None)


def _match(args: argparse.Namespace) -> None:
    from benchmarks.match import match

    if not args.cpu_minutes > 0:
        args.usage(f"argument --cpu-minutes: {args.cpu_minutes:g}; allowed: more than 0")
    places = (args.recipe, args.corpora, args.weights, args.out)
    print(json.dumps(match(*places, args.cpu_minutes), indent=1))


def _show(args: argparse.Namespace, result: dict[str, Any], markdown: Any, plot: Any) -> None:
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(markdown(result), encoding="utf-8")
    else:
        print(markdown(result), end="")
    if plot and args.plot:
        plot(result, args.plot)


def _parser() -> argparse.ArgumentParser:
    raw: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    about = "Measure what edge_ser ships, and what else there is."
    parser = read.Parser(prog="python -m benchmarks", description=about, epilog=_LATENCY, **raw)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    about = "Time torch and ONNX, full precision and INT8, in turns; loading, memory, cold start."
    latency = verbs.add_parser("latency", help=about, description=about, epilog=_LATENCY, **raw)
    latency.set_defaults(run=_latency, usage=latency.error)
    about = "Compare with what other tools make of the same network: time, size, memory, answers."
    peers = verbs.add_parser("peers", help=about, description=about, epilog=_PEERS, **raw)
    peers.set_defaults(run=_peers, usage=peers.error)

    about = "Measure every model in every precision by every runtime on a GPU, or say why not."
    gpu = verbs.add_parser("gpu", help=about, description=about, epilog=_GPU, **raw)
    gpu.set_defaults(run=_gpu, usage=gpu.error)

    about = "Ask every clip of a head that has not heard its speaker, in full precision and INT8."
    accuracy = verbs.add_parser("accuracy", help=about, description=about, epilog=_ACCURACY, **raw)
    accuracy.set_defaults(run=_accuracy, usage=accuracy.error)

    about = "Teach a wav2vec2-base what the layers of Whisper make of speech, to measure it."
    match = verbs.add_parser("match", help=about, description=about, epilog=_MATCH, **raw)
    match.set_defaults(run=_match, usage=match.error)

    about = "Ask ARM and x86 without VNNI, emulated by qemu, and compare with this machine."
    emulate = verbs.add_parser("emulate", help=about, description=about, epilog=_EMULATE, **raw)
    emulate.set_defaults(run=_emulate, usage=emulate.error)

    embedded = ["default", "tiny"]
    text = "embedded models or folders (default tiny)"
    for verb in (latency, emulate):
        option(verb, "--bundles", str, embedded, "DIR|NAME", text, nargs="+")
    recipes = ROOT / "export" / "recipes"
    text = "where default.toml is (export/recipes)"
    option(latency, "--recipes", read.existing, recipes, "DIR", text)
    text = "pretrained checkpoints, for torch default"
    option(latency, "--weights", read.existing, None, "DIR", text)
    text = "its trained head, model.safetensors of the training stage; else a random one"
    option(latency, "--trained", read.existing, None, "FILE", text)
    option(latency, "--window", float, 3.0, "S", "seconds of audio (3)")
    text = "folder of a fine-tuned Wav2Vec2, HuBERT or WavLM"
    option(peers, "checkpoint", read.existing, None, "CHECKPOINT", text, nargs="?")
    text = "instead of it, random weights of the size of wav2vec2-base or XLSR-53"
    peers.add_argument("--random", choices=("base", "xlsr"), help=text)
    option(peers, "--out", read.output, None, "DIR", "where graphs are kept", required=True)
    text = "manifest of clips to calibrate with, column path; else synthetic sounds"
    option(peers, "--calibration", read.existing, None, "CSV", text)
    text = "folder of clips whose answers are compared; else synthetic sounds"
    option(peers, "--clips", read.existing, None, "DIR", text)
    option(peers, "--windows", read.lengths, [1.0, 3.0, 7.0], "S,S", "seconds of audio (1,3,7)")
    text = "NAME, or NAME=FOLDER with trained files (default tiny whisper_base wav2vec2_base)"
    every = [(name, None) for name in ("default", "tiny", "whisper_base", "wav2vec2_base")]
    option(gpu, "models", read.model, every, "MODEL", text, nargs="*")
    option(gpu, "--out", read.output, None, "DIR", "takes graphs and cells", required=True)
    text = "pretrained checkpoints, for torch to load the network of a run"
    option(gpu, "--weights", read.existing, None, "DIR", text)
    text = "clips to ask trained models for: columns path, and emotion where it is known"
    option(gpu, "--manifest", read.existing, None, "CSV", text)
    option(gpu, "--runtimes", read.runtimes, None, "NAME,NAME", "some of them (all)")
    option(gpu, "--batches", read.numbers, [1, 32], "N,N", "windows at once (1,32)")
    option(gpu, "--window", read.at_least(0.5), 3.0, "S", "seconds of audio (3)", dest="window_s")
    text = "most time for a cell (1800)"
    option(gpu, "--longest", read.at_least(1), 1800, "S", text, dest="longest_s")
    gpu.add_argument("--prepare", action="store_true", help="make the graphs only: needs no GPU")
    option(accuracy, "recipe", read.existing, None, "RECIPE", "a TOML file with [train]")
    option(match, "recipe", read.existing, None, "RECIPE", "a TOML file whose encoder is a Whisper")
    text = "folder with a folder a corpus"
    for verb in (accuracy, match, emulate):
        option(verb, "--corpora", read.existing, None, "DIR", text, required=True)
    for verb in (accuracy, match):
        text = "folder of checkpoints; without it: hub ids"
        option(verb, "--weights", read.existing, None, "DIR", text)
    text = "where the userland and the answers are kept"
    option(emulate, "--out", read.output, None, "DIR", text, required=True)
    option(emulate, "--clips", int, 200, "N", "clips that ARM is asked (200)")
    option(emulate, "--x86-clips", int, 4, "N", "of them, those that other x86 are asked (4)")
    text = "where the run left its results; what is made here stays there"
    option(accuracy, "--out", read.existing, None, "DIR", text, required=True)
    option(match, "--out", read.output, None, "DIR", "where the results go", required=True)
    text = "processor time of the training; all cores compute (60)"
    option(match, "--cpu-minutes", float, 60, "N", text)
    option(accuracy, "--seed", int, 0, "N", "of the run (0)")
    text = "variants of the recipe's [quantize], in place of other tools"
    option(accuracy, "--variants", read.existing, None, "FILE", text)
    text = "which other tools, such as onnxruntime_dynamic; '' for none (all that are known)"
    option(accuracy, "--tools", str, None, "NAME,NAME", text)
    for verb, runs in ((latency, 100), (peers, 30)):
        option(verb, "--threads", read.numbers, [1, 2], "N,N", "numbers of threads (1,2)")
        option(verb, "--runs", int, runs, "N", f"rounds that count ({runs})")
    option(gpu, "--runs", read.at_least(1, int), 300, "N", "runs of a cell that count (300)")
    text = "write the tables here, not on stdout"
    for verb in (latency, peers, gpu, accuracy, emulate):
        option(verb, "--json", read.output, None, "FILE", "write all numbers here")
        option(verb, "--markdown", read.output, None, "FILE", text)
    for verb in (latency, peers, gpu, accuracy):
        option(verb, "--plot", read.output, None, "FILE", "draw a bar chart here (PNG, SVG)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
