"""The errors of model making; each derives from the runtime's base, so one `except` catches both.

EdgeSerError
├── RecipeError       a recipe asks for something that it cannot have
├── CorpusError       a corpus or a split of it is not usable
└── CertificateError  a model missed its gate, or a certificate does not fit its bundle
"""

from edge_ser.errors import EdgeSerError


class RecipeError(EdgeSerError):
    """A recipe has an unknown key, a wrong value, or names something that is missing."""


class CorpusError(EdgeSerError):
    """A manifest, a clip or a split breaks a rule that training or evaluation relies on."""


class CertificateError(EdgeSerError):
    """A model missed the gate, or a certificate contradicts the bundle that it stands for."""
