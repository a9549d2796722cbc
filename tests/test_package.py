"""The package as a whole: its names, and the backend that it needs."""

import subprocess
import sys
import types

import pytest

import farhox


def test_every_public_name_is_declared_and_every_declared_name_is_there():
    public = {name for name, value in vars(farhox).items()
              if not name.startswith("_") and not isinstance(value, types.ModuleType)}
    assert public <= set(farhox.__all__)
    assert len(set(farhox.__all__)) == len(farhox.__all__)
    assert all(hasattr(farhox, name) for name in farhox.__all__)


def test_public_functions_and_classes_have_docstrings():
    undocumented = [name for name in farhox.__all__ if not (getattr(farhox, name).__doc__ or "").strip()]
    assert undocumented == []


# Other backends need packages that may not be there, so that a stand-in answers the one question that farhox asks.
OTHER_BACKEND = """
import sys, types
sys.modules["keras"] = types.ModuleType("keras")
sys.modules["keras"].backend = types.SimpleNamespace(backend=lambda: "jax")
"""


@pytest.mark.parametrize("module", ["farhox", "farhox.dynamics"])
def test_another_keras_backend_is_an_import_error_that_says_what_to_set(module):
    process = subprocess.run(
        [sys.executable, "-c", f"{OTHER_BACKEND}import {module}"], capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    message = process.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: farhox") and "KERAS_BACKEND=tensorflow" in message
    assert "'jax'" in message
