"""smtune: Sparse Matrix Tuning for large language models."""

from smtune.errors import InputError
from smtune.version import __version__

__all__ = ["InputError", "__version__"]
