"""Every error that edge_ser raises on purpose, each with a message of one line.

    Exception
    └── EdgeSerError           catch this one to catch them all
        ├── AudioError         the input: missing, empty, truncated, too short, not finite, ...
        ├── BundleError        the model folder: a changed byte, a wrong value, a missing file, ...
        ├── EngineError        the backend failed while it ran a graph that it had opened
        ├── DeviceError        the device asked for is not there, or cannot run that precision
        └── MissingDependency  (also an ImportError) an optional package is not installed

A message says what was got, what is allowed, and what to do.
"""


class EdgeSerError(Exception):
    """Base of all errors of edge_ser."""


class AudioError(EdgeSerError):
    """The audio given cannot be used."""


class BundleError(EdgeSerError):
    """The bundle is missing, damaged, or contradicts itself."""


class EngineError(EdgeSerError):
    """The inference backend failed."""


class DeviceError(EdgeSerError):
    """The device asked for cannot be used."""


class MissingDependency(EdgeSerError, ImportError):  # noqa: N818 (reads as what it is)
    """An optional package is not installed; the message holds the pip command."""
