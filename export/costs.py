"""What INT8 costs and keeps, in a few numbers of a bundle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_ser.bundle import Bundle
from export.qdq import WEIGHTS


def costs(bundle: Path) -> dict[str, Any]:
    """Return what a bundle costs and keeps.

    Returns:
        Its ``name``, whether it is ``certified``, its ``float_layers`` that could be INT8, and of
        the ``graphs`` in full precision and INT8 their ``mb``, the ``time`` that they take (full
        precision takes 1; measured while it was quantized), ``labels_equal``, and ``ua`` with its
        interval where emotions are known.
    """
    certificate = json.loads((bundle / "certificate.json").read_text())
    found = certificate["quantization"]
    # Behind INT8 comes full precision, which counts as all layers, and so may they.
    chosen = next(r for r in found["front"] if r["float_layers"] == len(found["given_back"]))
    weights_mb = (bundle / WEIGHTS).stat().st_size / 1e6
    graphs = {}
    for name, more_mb, time in (("fp32", 0.0, 1.0), ("int8_x86", weights_mb, chosen["time"])):
        system = certificate["systems"][name]
        graphs[name] = {
            "file": system["graph"],
            "mb": (bundle / system["graph"]).stat().st_size / 1e6 + more_mb,
            "time": time,
            "labels_equal": certificate["gate"].get(name, {"labels_equal": 1.0})["labels_equal"],
            "ua": system["pooled"]["ua"] if "pooled" in system else None,
        }
    metadata = Bundle.open(bundle).metadata
    return {
        "name": metadata.name,
        "certified": metadata.certified,
        "float_layers": found["given_back"],
        "graphs": graphs,
    }


def table(found: Mapping[str, Any]) -> str:
    """Return `costs` as a Markdown table."""
    lines = ["| graph | MB | time | equal answers | pooled UA (95 %) |", "|---|---|---|---|---|"]
    for name, title in (("fp32", "full precision"), ("int8_x86", "INT8")):
        graph = found["graphs"][name]
        ua = "not measured"
        if graph["ua"]:
            ua = "{value:.3f} ({low:.3f} to {high:.3f})".format(**graph["ua"])
        equal = f"{graph['labels_equal']:.1%}"
        lines.append(f"| {title} | {graph['mb']:.1f} | {graph['time']:.2f} | {equal} | {ua} |")
    return "\n".join(lines)
