"""What flows through a graph: the values of any of its tensors on speech."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

Floats = npt.NDArray[np.float32]


def tensor_values(
    model: onnx.ModelProto, names: Sequence[str], windows: Sequence[Floats]
) -> Iterator[dict[str, Floats]]:
    """Yield the values of tensors, by name, for one window after the other.

    Args:
        model: With its weights inside; left as it is.
        names: Of tensors that some node of the graph computes; none yields nothing.
        windows: Speech, each of shape (T,).
    """
    if not names:
        return
    probed = onnx.ModelProto.FromString(model.SerializeToString())
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(
        probed.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for window in windows:
        values = session.run(list(names), {"samples": window[None]})
        yield dict(zip(names, values, strict=True))
