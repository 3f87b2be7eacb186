"""The picture of a certificate: what it scored, where it errs, how sure it is, how it adapts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from export.adapt import KINDS

SYSTEMS = {"fp32": "full precision", "int8_x86": "INT8"}

NAME = 28  # letters of a layer's name beside its bar


def draw(certificate: Mapping[str, Any], file: Path) -> None:
    """Draw a certificate as PNG, 850 pixels high and 500 wide for every two panels.

    Args:
        certificate: The document; a panel is drawn of each part that it has.
        file: Where to write.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [nonspeech, conditions, layers, float_layers]
    if "pooled" in certificate["systems"]["fp32"]:
        panels = [accuracy, confusion, reliability, risk, *panels]
    if "adapted" in certificate:
        panels.insert(4, adaptation)
    columns = (len(panels) + 1) // 2
    figure, axes = plt.subplots(2, columns, figsize=(5 * columns, 8.5), layout="constrained")
    for axis, panel in zip(axes.ravel(), panels, strict=False):
        panel(axis, certificate)
    for axis in axes.ravel()[len(panels) :]:
        axis.set_axis_off()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def accuracy(axis: Any, certificate: Mapping[str, Any]) -> None:
    """Draw the UA of every corpus with its interval."""
    names = list(certificate["systems"]["fp32"]["corpora"])
    for place, (system, title) in enumerate(SYSTEMS.items()):
        scores = certificate["systems"][system]
        intervals = [scores["corpora"][name]["masked"]["ua"] for name in names]
        intervals.append(scores["pooled"]["ua"])
        values = np.array([interval["value"] for interval in intervals])
        spread = np.abs([[i["low"], i["high"]] for i in intervals] - values[:, None]).T
        where = np.arange(len(values)) + 0.38 * place
        axis.bar(where, values, 0.36, yerr=spread, capsize=3, label=title)
    where = np.arange(len(names) + 1) + 0.19
    axis.set_xticks(where, [*names, "pooled, all labels"], rotation=20, ha="right")
    axis.set_ylim(0, 1)
    axis.set_ylabel("unweighted accuracy")
    axis.set_title("Test speakers, 95 % intervals")
    axis.legend()


def confusion(axis: Any, certificate: Mapping[str, Any]) -> None:
    """Draw how often each label was answered for each."""
    whole = certificate["systems"]["int8_x86"]["pooled"]
    matrix = np.array(whole["confusion"], float)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = certificate["labels"]
    axis.set_xticks(range(len(labels)), labels, rotation=40, ha="right")
    axis.set_yticks(range(len(labels)), labels)
    for row, column in np.ndindex(*matrix.shape):
        ink = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, int(matrix[row, column]), ha="center", va="center", color=ink)
    axis.set_title(f"INT8, {whole['clips']} clips: true (rows), predicted")


def adaptation(axis: Any, certificate: Mapping[str, Any]) -> None:
    """Draw the UA after so many earlier utterances of a speaker."""
    for kind in KINDS:
        points = [
            (row["utterances"], row["pooled_ua"])
            for row in certificate["adapted"]
            if row["history"] in ("none", kind)
        ]
        axis.plot(*zip(*points, strict=True), marker="o", label=f"{kind} emotions")
    axis.set_xscale("symlog", linthresh=1)
    counts = sorted({row["utterances"] for row in certificate["adapted"]})
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xlabel("earlier utterances of the same speaker")
    axis.set_ylabel("pooled unweighted accuracy")
    axis.set_title("INT8, adapting to the speaker")
    axis.legend()


def reliability(axis: Any, certificate: Mapping[str, Any]) -> None:
    """Draw how often answers of a confidence are right."""
    axis.plot([0, 1], [0, 1], color="gray", linewidth=1)
    for system, title in SYSTEMS.items():
        whole = certificate["systems"][system]["pooled"]
        bins = whole["reliability"]
        axis.plot(
            [one["confidence"] for one in bins], [one["accuracy"] for one in bins],
            marker="o", label=f"{title}, calibration error {whole['ece']:.3f}",
        )  # fmt: skip
    axis.set_xlabel("confidence")
    axis.set_ylabel("share of right answers")
    axis.set_title("Is it as sure as it is right?")
    axis.legend()


def risk(axis: Any, certificate: Mapping[str, Any]) -> None:
    """Draw the error that is left when only the surest answers are given."""
    for system, title in SYSTEMS.items():
        found = certificate["systems"][system]["pooled"]["risk"]
        axis.plot([float(share) for share in found], list(found.values()), marker="o", label=title)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("share of clips that are answered, the surest first")
    axis.set_ylabel("share of wrong answers among them")
    axis.set_title("Risk against coverage")
    axis.legend()


def nonspeech(axis: Any, certificate: Mapping[str, Any]) -> None:
    """Draw how much of what is no speech is called uncertain."""
    found = certificate["nonspeech"]
    axis.bar(list(found["by_kind"]), list(found["by_kind"].values()))
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("share called uncertain")
    axis.set_title(f"INT8, {found['minutes']} minutes of no speech")


def conditions(axis: Any, certificate: Mapping[str, Any]) -> None:
    """Draw how often INT8 says what full precision says, by length, level and noise."""
    rows = certificate["conditions"]
    axis.barh([row["condition"] for row in rows], [row["labels_equal"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0.9 * min(row["labels_equal"] for row in rows), 1)
    axis.set_xlabel("share of equal answers")
    axis.set_title("INT8 and full precision")


def layers(axis: Any, certificate: Mapping[str, Any]) -> None:
    """Draw the layers whose rounding alone moves the answers most; hatched, those given back."""
    found = certificate["quantization"]
    worst = dict(list(found["alone"].items())[:12])
    bars = axis.barh([_end_of(name) for name in worst], list(worst.values()))
    for bar, name in zip(bars, worst, strict=True):
        bar.set_hatch("//" if name in found["given_back"] else "")
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("divergence of the answers, nats")
    axis.set_title("One layer in INT8 (hatched: given back)")


def _end_of(name: str) -> str:
    """Return the last parts of a layer's name, as many as a panel has room for."""
    while len(name) > NAME and "." in name:
        name = name.partition(".")[2]
    return name


def float_layers(axis: Any, certificate: Mapping[str, Any]) -> None:
    """Draw what more layers given back would gain and cost."""
    rows = certificate["quantization"]["front"][:-1]  # the last is full precision
    axis.plot([row["time"] for row in rows], [row["divergence"] for row in rows], marker="o")
    for row in rows:
        text = f" {row['float_layers']}, {row['mb']:.1f} MB"
        axis.annotate(text, (row["time"], row["divergence"]))
    axis.margins(x=0.25)  # for the words beside the rightmost point
    axis.set_yscale("log")
    axis.set_xlabel("time, full precision is 1")
    axis.set_ylabel("divergence of the answers, nats")
    axis.set_title("With more layers given back")
