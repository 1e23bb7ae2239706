"""Tests that want a package which not every environment has.

They skip without it. With SMTUNE_REQUIRE_<PACKAGE>=1, as in CI, they run, and fail.
"""

from __future__ import annotations

import importlib.util
import os

import pytest


def lacks(package: str) -> bool:
    """Whether a package is missing where it may be."""
    is_required = os.environ.get(f"SMTUNE_REQUIRE_{package.upper()}") == "1"
    return importlib.util.find_spec(package) is None and not is_required


def needs(package: str, install: str) -> pytest.MarkDecorator:
    """Skips a test that lacks the package; `install` says how it is had."""
    return pytest.mark.skipif(lacks(package), reason=f"needs {package}: {install}")
