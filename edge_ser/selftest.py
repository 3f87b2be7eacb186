"""Does this machine compute what the bundle's maker computed?"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from edge_ser.bundle import Bundle
from edge_ser.engines.base import Engine
from edge_ser.errors import BundleError

# Of the largest logit. Float layers round differently from one processor to the next, and that can
# move an INT8 value by a level; a kernel that saturates is wrong by far more.
TOLERANCE = 0.05


def deviation(bundle: Bundle, engine: Engine) -> float:
    """Run the windows in ``selftest.npz`` and compare the logits with the recorded ones.

    The file holds ``samples_0``, ``samples_1``, ... (float32, (T,)) and for each graph file
    ``<stem>_0``, ``<stem>_1``, ... (float32, (C,)).

    Returns:
        The largest difference of two logits as a part of the largest recorded logit, 0 or more;
        infinite if a logit is not a number.

    Raises:
        BundleError: The bundle has no self-test for this graph.
        EngineError: The graph failed.
    """
    file = bundle.file("selftest.npz")
    stem = Path(engine.graph).stem
    try:
        with np.load(file, allow_pickle=False) as recorded:
            count = sum(name.startswith("samples_") for name in recorded.files)
            windows = [recorded[f"samples_{i}"] for i in range(count)]
            expected = np.stack([recorded[f"{stem}_{i}"] for i in range(count)])
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as exc:
        raise BundleError(f"{str(file)!r} has no self-test for {stem}.onnx") from exc
    computed = np.stack([engine.run(samples[np.newaxis])[0] for samples in windows])
    if computed.shape != expected.shape:
        raise BundleError(f"{str(file)!r} has no self-test for {stem}.onnx")
    largest = float(np.abs(computed - expected).max() / np.abs(expected).max())
    return largest if np.isfinite(largest) else float("inf")
