"""The full-precision ONNX graph: samples to logits and embedding, checked against torch."""

import ast
import json
import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from tqdm import tqdm

from edge_ser.bundle import SCHEMA_VERSION
from export.errors import CertificateError
from export.model import Classifier, load_classifier
from export.qdq import QUANTIZED
from export.speech import RATE_HZ, Speech

OPSET = 20  # LayerNormalization stays one node; TensorRT 10.3 and ONNX Runtime 1.20 both read it
OUTPUTS = ("logits", "embedding")
SCOPES = "pkg.torch.onnx.name_scopes"
"""Layers are called as the modules of the network are, which the exporter notes here."""

PARITY = 1e-4  # largest difference of a logit from torch's


def export_graph(
    model: Classifier, properties: Mapping[str, Any], rate_hz: int, file: Path
) -> None:
    """Write the network as ONNX with dynamic batch and time.

    Args:
        model: In evaluation mode.
        properties: Goes into ``metadata_props``, each value as JSON.
        rate_hz: Of the samples; the example window is one second long.
        file: The ONNX file to write.
    """
    example = torch.randn(2, rate_hz, generator=torch.Generator().manual_seed(0)) * 0.1
    dynamic = {"samples": {0: torch.export.Dim("N"), 1: torch.export.Dim("T", min=rate_hz // 4)}}
    with warnings.catch_warnings():
        # The exporter warns of its own deprecations; what it writes is checked below.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["samples"],
            output_names=[f"{name}_output" for name in OUTPUTS],
            dynamic_shapes=dynamic,
            verbose=False,
        )
    proto = program.model_proto
    # A value inside may be called as an output is: the lookup of an embedding, for one.
    names = {name: f"{name}_inside" for name in OUTPUTS}
    names |= {f"{name}_output": name for name in OUTPUTS}
    taken = Counter[str]()
    for node in proto.graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        if node.op_type in QUANTIZED and SCOPES in notes:
            place = ast.literal_eval(notes[SCOPES])[-2]  # the module; behind it the operation
            taken[place] += 1
            node.name = place + (f"_{taken[place]}" if taken[place] > 1 else "")
        # The exporter notes the source lines, with their place on this disk.
        del node.metadata_props[:]
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    for value in (*proto.graph.output, *proto.graph.value_info):
        value.name = names.get(value.name, value.name)
    onnx.helper.set_model_props(proto, {k: json.dumps(v) for k, v in properties.items()})
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, file)


def check_parity(
    model: Classifier, file: Path, windows: Sequence[npt.NDArray[np.float32]]
) -> float:
    """Compare the graph with torch on windows of several lengths and levels.

    Args:
        model: In evaluation mode.
        file: Its graph.
        windows: Real speech, each of shape (T,). Each is tried as it is, 30 dB softer, and louder
            up to a peak of 1.

    Returns:
        The largest absolute difference of a logit.

    Raises:
        CertificateError: It is not below `PARITY`.
    """
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    worst = 0.0
    for window in windows:
        for gain in (1.0, 10 ** (-30 / 20), 1 / max(float(np.abs(window).max()), 1e-6)):
            samples = (window * np.float32(gain))[None]
            with torch.no_grad():
                expected = model(torch.from_numpy(samples))[0].numpy()
            (logits,) = session.run(["logits"], {"samples": samples})
            # Unlike max, np.maximum does not lose a NaN.
            worst = float(np.maximum(worst, np.abs(logits - expected).max()))
    if not worst < PARITY:
        raise CertificateError(
            f"{file.name} differs from torch by {worst:.1e} in a logit; allowed is below {PARITY}"
        )
    return worst


def make_graph(speech: Speech, weights: Path | None, trained: Path, folder: Path) -> None:
    """The stage: ``model.onnx``, and in ``parity.json`` how far it is from torch.

    Args:
        speech: Labels, and real speech for the comparison.
        weights: Folder of pretrained checkpoints.
        trained: Folder of the training stage.
        folder: Takes the files.
    """
    model = load_classifier(speech.recipe, weights, trained / "model.safetensors").fold_norms()
    properties = {"labels": speech.labels, "sample_rate_hz": RATE_HZ}
    properties["schema_version"] = SCHEMA_VERSION
    file = folder / "model.onnx"
    export_graph(model, properties, RATE_HZ, file)
    windows = sorted(speech.first_windows(speech.split.calibration), key=len)
    worst = check_parity(model, file, windows[:: max(1, len(windows) // 8)])
    (folder / "parity.json").write_text(json.dumps({"worst_logit_difference": worst}))
    tqdm.write(f"graph: differs from torch by {worst:.1e} at most")
