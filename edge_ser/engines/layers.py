"""What TensorRT made of a graph: the precision of every layer of a plan, and what each costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_PRECISIONS = (
    ("int8", "int8"),
    ("half", "fp16"),
    ("fp16", "fp16"),
    ("float", "fp32"),
    ("fp32", "fp32"),
)


@dataclass(frozen=True)
class Layer:
    """A layer of a plan.

    Attributes:
        name: As TensorRT calls it.
        kind: Its type there.
        precision: ``"int8"``, ``"fp16"``, ``"fp32"``, or ``"other"``: that of its weights, else of
            what it reads.
        reformat: Whether it only changes how a tensor lies in memory, or its type.
        ms: Time of the layer in one run, 0 where it runs as a part of another.
    """

    name: str
    kind: str
    precision: str
    reformat: bool
    ms: float


def layers_of(trt: Any, engine: Any, context: Any, run: Callable[[], None]) -> list[Layer]:
    """Return the layers of a plan, each with the time that it took in one run.

    Args:
        trt: See `edge_ser.engines.build.tensorrt_module`.
        engine: Of a plan that was built with all details.
        context: Of the engine.
        run: Runs it once, to the end, and not as a captured graph.
    """

    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.ms: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.ms[layer_name] = self.ms.get(layer_name, 0) + ms

    profiler = context.profiler = Profiler()
    run()
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return [_layer(one, profiler.ms) for one in json.loads(text)["Layers"]]


def _layer(entry: dict[str, Any], ms: dict[str, float]) -> Layer:
    name, kind = entry["Name"], entry.get("LayerType", "")
    types = [entry.get("Weights", {}).get("Type", "")]
    for one in entry.get("Inputs", []):
        types.append(f"{one.get('Format/Datatype', '')} {one.get('Datatype', '')}")
    said = next((text.lower() for text in types if text.strip()), "")
    precision = next((ours for theirs, ours in _PRECISIONS if theirs in said), "other")
    reformat = kind == "Reformat" or entry.get("Origin") == "REFORMAT"
    return Layer(name, kind, precision, reformat, ms.get(name, 0.0))


def summary(layers: Sequence[Layer]) -> str:
    """Return a line: how many layers of each precision, what they cost, and what reformats cost."""

    def cost(chosen: list[Layer]) -> str:
        return f"{len(chosen)} {sum(layer.ms for layer in chosen):.2f} ms"

    kinds = sorted({layer.precision for layer in layers if not layer.reformat})
    parts = [
        f"{kind} {cost([one for one in layers if one.precision == kind and not one.reformat])}"
        for kind in kinds
    ]
    parts.append(f"reformats {cost([layer for layer in layers if layer.reformat])}")
    return f"layers: {', '.join(parts)}"
