"""Answers clips wherever Python and the wheel are: ``python respond.py JOB`` prints lines of JSON.

qemu runs it where nothing else of the checkout can be imported, and this Python runs it as it is,
so that both do the same. The first line tells about the system, each that follows is the answer to
a clip.
"""

from __future__ import annotations

import io
import json
import logging
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edge_ser import audio
from edge_ser.bundle import Bundle
from edge_ser.engines import has_vnni
from edge_ser.engines.onnx import OnnxEngine
from edge_ser.recognizer import Recognizer
from edge_ser.selftest import deviation

PACKAGES = ("edge-ser", "numpy", "onnxruntime", "soundfile", "soxr")


def respond(job: dict[str, Any]) -> None:
    """Print the lines.

    Args:
        job: The ``bundle``; for which ``machine`` its graph is, None for what the runtime chooses;
            whether that graph is computed in ``float``; ``product``, a graph that multiplies 255 by
            the largest weights; the ``clips``; and how many lines are ``known`` from a run before.
    """
    log = io.StringIO()
    logging.basicConfig(stream=log, format="%(message)s")
    bundle = Bundle.open(job["bundle"])
    graph = bundle.graph(machine=job["machine"])
    engine = OnnxEngine(graph, threads=1, float_arithmetic=job["float"])
    if job["machine"]:
        recognizer = Recognizer(bundle.metadata, engine)
    else:
        recognizer = Recognizer.load(job["bundle"], threads=1)
    if not job["known"]:
        facts = {
            "machine": platform.machine(),
            "vnni": has_vnni(),
            "versions": {"python": platform.python_version(), **_versions()},
            "graph": recognizer.engine.graph,
            "deviation": deviation(bundle, engine),
            "log": log.getvalue().splitlines(),
            "products": _products(job["product"]),
            # The clips need no resampling, and that it works here is to be seen as well.
            "resampled": audio.read(job["clips"][0], rate_hz=22_050)[::50].tolist(),
        }
        print(json.dumps(facts), flush=True)
    for clip in job["clips"][max(job["known"] - 1, 0) :]:
        started = time.perf_counter()
        probs = list(recognizer.predict(clip).probs.values())
        took_s = round(time.perf_counter() - started, 3)
        print(json.dumps({"clip": clip, "probs": probs, "s": took_s}), flush=True)


def _versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in PACKAGES}


def _products(graph: str) -> list[int]:
    """Return the different sums that the INT8 kernel makes of the largest products."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (sums,) = session.run(None, {given.name: np.full(given.shape, 255, np.uint8)})
    return [int(one) for one in np.unique(sums)]


if __name__ == "__main__":
    respond(json.loads(Path(sys.argv[1]).read_text()))
