"""What TensorRT has built on this machine, kept: a cache that says why it builds again.

A plan is machine code for one GPU and one version of TensorRT. It is never shipped and never taken
from a bundle; whoever can write one runs code as its reader. So a plan is read only where nobody
but this user can have written it, and only if it was built of the same graph, for the same shapes,
by the same TensorRT, on the same GPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_ser.errors import EngineError

_LOG = logging.getLogger("edge_ser")


@dataclass(frozen=True)
class Key:
    """All that a plan depends on.

    Attributes:
        graph_sha256: Of the graph and of its weights, see `edge_ser.engines.plans.digest`.
        precision: ``"int8"``, ``"fp16"`` or ``"fp32"``.
        batch: Windows at once.
        samples: Length of a window.
        tensorrt: Name of the module and its version, e.g. ``"tensorrt 10.3.0"``.
        gpu: Its name.
        compute_capability: E.g. ``"8.7"``.
    """

    graph_sha256: str
    precision: str
    batch: int
    samples: int
    tensorrt: str
    gpu: str
    compute_capability: str

    @property
    def file(self) -> str:
        """Return the name of the file: of one graph and shape, on whatever machine."""
        return f"{self.graph_sha256[:16]}-{self.precision}-{self.batch}x{self.samples}.plan"


def digest(hashes: list[str]) -> str:
    """Return one SHA-256 for those of several files, their order included."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def cache_folder() -> Path:
    """Return the folder of plans, made if it is not there.

    It is ``edge_ser/engines`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``.

    Raises:
        EngineError: It cannot be made, or others can write to it.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(home) if home else Path.home() / ".cache") / "edge_ser" / "engines"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        foreign = _foreign(os.lstat(folder), stat.S_ISDIR)
    except OSError as exc:
        raise EngineError(
            f"{str(folder)!r} cannot be made ({exc.strerror}); set XDG_CACHE_HOME to a folder of "
            "your own"
        ) from exc
    if foreign:
        raise EngineError(
            f"{str(folder)!r} {foreign}, and engines are machine code: run `chmod go-w` on it, or "
            "set XDG_CACHE_HOME to a folder of your own"
        )
    return folder


def read(file: Path, key: Key) -> bytes | None:
    """Return a plan that was built for a key here; None, said in the log, where it is not.

    Args:
        file: Of the plan.
        key: What it must have been built for.
    """
    try:
        return _checked(file, key)
    except FileNotFoundError:
        return None
    except OSError as exc:
        why = f"cannot be read ({exc.strerror})"
    except ValueError as exc:
        why = str(exc)
    _LOG.warning(f"engine {str(file)!r} {why}: it is built again")
    return None


def _checked(file: Path, key: Key) -> bytes:
    """Return the plan; a ValueError says what is wrong with the file."""
    number = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(number, "rb") as stream:
        if foreign := _foreign(os.fstat(number), stat.S_ISREG):
            raise ValueError(foreign)
        header, plan = stream.readline(), stream.read()
    try:
        found = dict(json.loads(header))
    except (TypeError, ValueError):
        raise ValueError("is damaged") from None
    for name, expected in asdict(key).items():
        if found.get(name) != expected:
            raise ValueError(f"is for {name} {found.get(name)!r}, needed is {expected!r}")
    if hashlib.sha256(plan).hexdigest() != found.get("plan_sha256"):
        raise ValueError("is damaged or cut off")
    return plan


def write(file: Path, key: Key, plan: bytes) -> None:
    """Keep a plan, at once or not at all; where that fails, the log says so and work goes on.

    Args:
        file: Of the plan.
        key: What it was built for.
        plan: The plan.
    """
    header = {**asdict(key), "plan_sha256": hashlib.sha256(plan).hexdigest()}
    name = None
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as stream:
            name = stream.name  # 0600, whatever the umask
            stream.write(json.dumps(header).encode() + b"\n" + plan)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except OSError as exc:
        if name:
            with suppress(OSError):
                os.unlink(name)
        _LOG.warning(
            f"the engine cannot be kept in {str(file.parent)!r} ({exc.strerror}): it works, and is "
            "built again next time"
        )


@contextmanager
def building(file: Path) -> Iterator[None]:
    """Let one process at a time build a plan; the others wait, and then find it there."""
    import fcntl  # there is none on Windows, nor these plans

    with open(file.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.warning(f"another process is building {file.name}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _foreign(found: os.stat_result, kind: Callable[[int], bool]) -> str:
    """Return why others may have written to it; nothing if only this user can."""
    if not kind(found.st_mode):
        return "is not what it should be"
    if found.st_uid != os.geteuid():
        return f"belongs to another user (uid {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by others"
    return ""
