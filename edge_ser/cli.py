"""The command ``edge-ser``: results on stdout, everything else on stderr.

Exit status: 0 done, 1 something failed and a line says what, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from edge_ser.arguments import parser
from edge_ser.bundle import Bundle
from edge_ser.errors import EdgeSerError
from edge_ser.recognizer import Recognizer
from edge_ser.samples import sample_paths

if TYPE_CHECKING:
    from edge_ser.power import Energy
    from edge_ser.speaker import Speaker

_RAW = "-t raw -f S16_LE -c 1"
_NOT_CERTIFIED = "INT8 answers too often otherwise than full precision; see certificate.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parser(_VERBS).parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except EdgeSerError as exc:
        _complain(str(exc), args.debug)
    except OSError as exc:  # of stdout: those of files are ours by now
        if not isinstance(exc, BrokenPipeError):  # the reader, `head` for one, has enough
            line = f"the output cannot be written ({exc.strerror}); send it elsewhere"
            _complain(line, args.debug)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 1


def program() -> NoReturn:
    """Run the command line and end the process."""
    # What is imported stays; looking for garbage among it every 700 objects takes 10 ms.
    gc.set_threshold(100_000)
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python would first take its modules and ONNX Runtime's apart: 20 ms, a tenth of what it takes
    # to name one clip.
    os._exit(status)


def _predict(args: argparse.Namespace) -> int:
    files = [*args.files, *(map(str, sample_paths()) if args.sample else ())]
    if not files:
        args.usage("give a FILE, or --sample")
    recognizer = _load(args)
    speaker = _speaker(args, recognizer)
    width = max(map(len, files))
    label_width = max(map(len, recognizer.metadata.labels))
    refused = 0
    for file in files:
        try:
            prediction = (speaker or recognizer).predict(file)
            if speaker:
                speaker.save(args.speaker)
        except EdgeSerError as exc:
            refused += 1
            _complain(str(exc), args.debug)
            if args.json:
                print(json.dumps({"file": file, "error": str(exc)}), flush=True)
            continue
        if args.json:
            print(json.dumps({"file": file, **prediction.to_json()}), flush=True)
        else:
            answer = f"{prediction.label:{label_width}}  {prediction.confidence:6.1%}"
            doubt = "  uncertain" if prediction.uncertain else ""
            print(f"{file:{width}}  {answer}{doubt}", flush=True)
    return 1 if refused else 0


def _speaker(args: argparse.Namespace, recognizer: Recognizer) -> Speaker | None:
    """Return the speaker of ``--speaker``: known if the file is there, else a new one."""
    if args.speaker is None:
        return None
    speaker = recognizer.adapt(args.speaker if os.path.exists(args.speaker) else None)
    speaker.save(args.speaker)  # a place that cannot be written is refused before any work
    return speaker


def _listen(args: argparse.Namespace) -> int:
    from edge_ser.live import listen

    if args.source != "-":
        args.usage(f"SOURCE is {args.source!r}; allowed: - (raw samples on the standard input)")
    rate = Bundle.open(args.bundle).metadata.sample_rate_hz
    if sys.stdin.isatty():
        args.usage(f"no audio comes in; for one: arecord -q {_RAW} -r {rate} | edge-ser listen -")
    recognizer = _load(args)
    label_width = max(map(len, recognizer.metadata.labels))
    for event, latency_ms in listen(recognizer, sys.stdin.buffer):
        if args.json:
            print(json.dumps({**event.to_json(), "latency_ms": round(latency_ms, 2)}), flush=True)
        else:
            doubt = "  uncertain" if event.uncertain else ""
            answer = f"{event.label:{label_width}}  {event.confidence:6.1%}{doubt}"
            print(f"{event.start_s:8.2f} to {event.end_s:8.2f} s  {answer}", flush=True)
    return 0


def _info(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    metadata = bundle.metadata
    if args.json:
        print(json.dumps({"path": str(bundle.path), **metadata.to_json()}))
        return 0
    rows = {
        "name": metadata.name,
        "path": bundle.path,
        "labels": ", ".join(metadata.labels),
        "rate": f"{metadata.sample_rate_hz} Hz",
        "windows": f"{metadata.window_s:g} s, one every {metadata.hop_s:g} s",
        "uncertain": f"below {metadata.abstain_below:.1%}",
        "certified": "yes" if metadata.certified else f"no: {_NOT_CERTIFIED}",
        "corpora": ", ".join(corpus.get("name", "?") for corpus in metadata.corpora) or "none",
    }
    for key, value in rows.items():
        print(f"{key:9}  {value}")
    for name in metadata.files:
        file = bundle.path / name
        size = f"{file.stat().st_size / 1e6:.2f} MB" if file.exists() else "not here (optional)"
        print(f"{'file':9}  {name:20}  {size}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from edge_ser.verification import verify

    passed, checks = True, []
    for check in verify(args.bundle, args.engine, args.manifest):
        passed &= check.ok
        checks.append({"check": check.check, "ok": check.ok, "detail": check.detail})
        if not args.json:
            print(f"{'ok' if check.ok else 'FAILED':6}  {check.check:14}  {check.detail}")
        if check.error and args.debug:
            traceback.print_exception(check.error)
    if args.json:
        print(json.dumps({"bundle": str(args.bundle), "ok": passed, "checks": checks}))
    return 0 if passed else 1


def _build(args: argparse.Namespace) -> int:
    from edge_ser.engines.layers import summary
    from edge_ser.engines.tensorrt import open_tensorrt

    bundle = Bundle.open(args.bundle)
    for window_s in args.window or [bundle.metadata.window_s]:
        for batch in args.batch:
            began = time.perf_counter()
            engine = open_tensorrt(
                bundle, precision=args.precision, batch=batch, window_s=window_s,
                progress=_show_progress,
            )  # fmt: skip
            built: dict[str, Any] = {
                "graph": engine.graph, "device": engine.device, "precision": args.precision,
                "batch": batch, "window_s": window_s, "plan_mb": engine.plan_mb,
                "seconds": round(time.perf_counter() - began, 1), "file": str(engine.file),
            }  # fmt: skip
            layers = engine.layers()
            engine.close()
            if args.json:
                rows = [dataclasses.asdict(layer) for layer in layers]
                print(json.dumps({**built, "layers": rows}), flush=True)
            else:
                print(
                    f"{engine.graph}, {batch} x {window_s:g} s, {built['plan_mb']:.1f} MB, ready "
                    f"after {built['seconds']:g} s on {engine.device}\n  {summary(layers)}\n"
                    f"  {built['file']}",
                    flush=True,
                )
    return 0


def _show_progress(phase: str, done: int, steps: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == steps else ""
        print(f"\r{phase}: {done} of {steps}\033[K", end=end, file=sys.stderr, flush=True)


def _bench(args: argparse.Namespace) -> int:
    from edge_ser import power, timing

    if args.energy:
        meter = power.open_meter(_powered(args))  # what cannot be measured is refused at once
        meter.close()
    began = time.perf_counter()
    recognizer = _load(args)
    load_ms = (time.perf_counter() - began) * 1e3
    times_ms = timing.measure(recognizer, args.seconds, args.runs)
    metadata, graph = recognizer.metadata, recognizer.engine.graph
    result: dict[str, Any] = {
        "bundle": metadata.name,
        "graph": graph,
        "graph_sha256": metadata.files[graph.removesuffix(" (float)")].sha256,
        "device": recognizer.engine.device,
        "threads": args.threads,
        "seconds": args.seconds,
        "runs": args.runs,
        "load_ms": load_ms,
        "peak_memory_mb": timing.peak_memory_mb(),
        **{name: timing.summary(samples) for name, samples in times_ms.items()},
    }
    if args.energy:
        energy = _energy(recognizer, args.seconds, _powered(args))
        result["energy"] = dataclasses.asdict(energy)
    if args.json:
        print(json.dumps(result))
        return 0
    threads = args.threads or "all"
    print(f"{graph} of {metadata.name} on {result['device']}, threads: {threads}")
    print(f"{args.seconds:g} s of noise, {args.runs} runs; load {load_ms:.0f} ms, ", end="")
    print(f"peak memory {result['peak_memory_mb']:.0f} MB")
    print(f"{'ms':10}  {'p50':>8}  {'p90':>8}  {'p99':>8}")
    for name in times_ms:
        values = (result[name][f"p{percent}_ms"] for percent in (50, 90, 99))
        print(f"{name:10}  " + "  ".join(f"{value:8.2f}" for value in values))
    if args.energy:
        print(
            f"{energy.joules:.4g} J a run above idling, standard error "
            f"{energy.standard_error_j:.2g}; {energy.work_w:.3g} W at work, "
            f"{energy.idle_w:.3g} W idle ({energy.meter})"
        )
    return 0


def _powered(args: argparse.Namespace) -> str:
    """Return the device whose energy counts."""
    return "cuda" if args.engine == "tensorrt" else args.device


def _energy(recognizer: Recognizer, seconds: float, device: str) -> Energy:
    """Measure the energy of one prediction."""
    from edge_ser import power, timing

    rate = recognizer.metadata.sample_rate_hz
    noise = timing.noise(seconds, rate)
    meter = power.open_meter(device)
    duration_s = (2 * power.BLOCKS + 1) * power.BLOCK_S
    print(f"edge-ser: energy, {duration_s:.0f} s: leave the machine alone", file=sys.stderr)
    try:
        return power.measure(meter, lambda: recognizer.predict(noise, rate))
    finally:
        meter.close()


def _load(args: argparse.Namespace) -> Recognizer:
    recognizer = Recognizer.load(
        args.bundle, engine=args.engine, precision=args.precision, threads=args.threads,
        device=args.device, fallback=args.fallback,
    )  # fmt: skip
    if not recognizer.metadata.certified:
        _complain(f"{recognizer.metadata.name} is not certified: {_NOT_CERTIFIED}", False)
    return recognizer


def _complain(line: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"edge-ser: {line}", file=sys.stderr, flush=True)


_VERBS = {
    "predict": _predict, "listen": _listen, "info": _info, "verify": _verify, "build": _build,
    "bench": _bench,
}  # fmt: skip
