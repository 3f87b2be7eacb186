"""Latencies in numbers that can be compared, and memory."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_ser.audio import Samples
from edge_ser.recognizer import Recognizer
from edge_ser.windows import windows

CONFIDENCE = 0.99
WARM_UP = 3  # runs that are not counted


def measure(recognizer: Recognizer, seconds: float, runs: int) -> dict[str, list[float]]:
    """Time noise through the whole recognizer, and the same windows through its engine alone.

    The two take turns, so that a slow moment of the machine hits both.

    Args:
        recognizer: What to time.
        seconds: How much audio a run classifies, 0.4 or more.
        runs: How many runs to count, after three to warm up.

    Returns:
        Latencies in ms, one for each run: ``end_to_end`` and ``engine``.
    """
    metadata, rate = recognizer.metadata, recognizer.metadata.sample_rate_hz
    samples = noise(seconds, rate)
    window, hop = round(metadata.window_s * rate), round(metadata.hop_s * rate)
    batches = [part[np.newaxis] for _, part in windows([samples], window, hop)]
    times_ms: dict[str, list[float]] = {"end_to_end": [], "engine": []}
    for _ in range(WARM_UP + runs):
        start = time.perf_counter()
        recognizer.predict(samples, rate)
        middle = time.perf_counter()
        for batch in batches:
            recognizer.engine.run(batch)
        end = time.perf_counter()
        times_ms["end_to_end"].append((middle - start) * 1e3)
        times_ms["engine"].append((end - middle) * 1e3)
    return {name: values[WARM_UP:] for name, values in times_ms.items()}


def noise(seconds: float, rate_hz: int) -> Samples:
    """Return white noise, the same at every call: float32 (T,), standard deviation 0.1."""
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * rate_hz)).astype(np.float32)


def percentile(samples_ms: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: the least sample that ``percent`` % do not exceed.

    It is always a sample that was measured, never a value between two.

    Args:
        samples_ms: Latencies in any order, at least one.
        percent: Above 0, up to 100.
    """
    rank = math.ceil(percent * len(samples_ms) / 100)
    return sorted(samples_ms)[rank - 1]


def early_stopping(samples_ms: Sequence[float], percent: float) -> float | None:
    """Return a latency that ``percent`` % of all queries keep, with 99 % confidence.

    This is MLPerf Inference's single-stream estimate (early stopping, tolerance 0): of n latencies
    it drops the t - 1 slowest and returns the slowest that is left, where t is the largest number
    for which at most t overruns among n would be a 1 % chance or less if the true percentile lay
    higher. It needs 64 latencies for 90 % and 662 for 99 %.

    Returns:
        The bound, or None if there are too few samples.
    """
    n, overrun = len(samples_ms), 1 - percent / 100
    chance, t = 0.0, -1  # of t overruns or fewer among n
    while True:
        chance += _binomial(n, t + 1, overrun)
        if chance > 1 - CONFIDENCE:
            break
        t += 1
    return sorted(samples_ms)[n - t] if t > 0 else None


def _binomial(n: int, k: int, p: float) -> float:
    """Return the chance of k among n; in logarithms, for n may be many thousands."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))


def summary(samples_ms: Sequence[float]) -> dict[str, float | None]:
    """Return p50, p90 and p99, and the early-stopping bounds of the last two, in ms."""
    return {
        "p50_ms": percentile(samples_ms, 50),
        "p90_ms": percentile(samples_ms, 90),
        "p99_ms": percentile(samples_ms, 99),
        "p90_early_stopping_ms": early_stopping(samples_ms, 90),
        "p99_early_stopping_ms": early_stopping(samples_ms, 99),
    }


def peak_memory_mb() -> float:
    """Return the largest resident memory of this process so far, in MB of 10^6 bytes.

    Linux tells it in ``/proc``; what `getrusage` tells there is inherited from the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
