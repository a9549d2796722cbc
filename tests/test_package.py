"""The package as a whole: its names, and the backend that it needs."""

import subprocess
import sys
import types

import pytest

import farhox

# The names of earlier versions, and what they are now.
MOVED = {
    **{name: f"farhox.hypergradients.{name}" for name in (
        "DartsHG", "EpisodesHG", "EvoGradHG", "HyperGradient", "HyperGradientResult", "InitialHG", "ObjectivesHG",
        "ReptileHG", "ReversibleHG")},
    **{name: f"farhox.linear_solvers.{name}" for name in (
        "Direct", "FixedPoint", "GMRES", "LinearSolver", "Neumann", "NormalConjugateGradient", "Nystrom")},
    **{name: f"farhox.dynamics.{name}" for name in ("BacktrackingGradientDescent", "InnerDynamics", "ProximalGradient")},
    **{name: f"farhox.constraints.{name}" for name in ("Box", "CappedSimplex", "Simplex")},
    "Dense": "farhox.linear_solvers.Direct", "InnerState": "farhox.problem.InnerState",
    "OptimizerGroups": "farhox.training.OptimizerGroups", "health": "farhox.insight.health",
    "k_fold_dataset": "farhox.data.k_fold_dataset"}
PUBLIC_ROOMS = [getattr(farhox, name) for name in farhox.__all__ if isinstance(getattr(farhox, name), types.ModuleType)]


def test_the_public_face_is_about_25_names_beside_the_rooms():
    names = [name for name in farhox.__all__ if not isinstance(getattr(farhox, name), types.ModuleType)]
    assert len(names) == 23 and len(PUBLIC_ROOMS) == 14
    assert dir(farhox) == sorted([*farhox.__all__, "__version__"])
    public = {name for name, value in vars(farhox).items()
              if not name.startswith("_") and not isinstance(value, types.ModuleType)}
    assert public == set(names)


@pytest.mark.parametrize("room", [farhox, *PUBLIC_ROOMS], ids=lambda room: room.__name__)
def test_the_declared_names_of_a_room_are_there_sorted_and_documented(room):
    assert list(room.__all__) == sorted(set(room.__all__))
    assert [name for name in room.__all__ if not (getattr(room, name).__doc__ or "").strip()] == []


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_works_and_says_what_to_write_instead(old):
    with pytest.warns(DeprecationWarning, match=f"farhox.{old} is now {MOVED[old]}: ") as caught:
        value = getattr(farhox, old)
    assert caught[0].filename == __file__
    room, _, name = MOVED[old].rpartition(".")
    assert value is getattr(sys.modules[room], name)
    assert name in sys.modules[room].__all__


def test_the_old_name_of_the_solver_works_in_its_room_too():
    with pytest.warns(DeprecationWarning, match="farhox.linear_solvers.Dense is now farhox.linear_solvers.Direct"):
        assert farhox.linear_solvers.Dense is farhox.linear_solvers.Direct


@pytest.mark.parametrize("room", [farhox, farhox.linear_solvers], ids=lambda room: room.__name__)
def test_a_name_that_never_was_is_an_attribute_error(room):
    with pytest.raises(AttributeError, match=f"module '{room.__name__}' has no attribute 'Denze'"):
        room.Denze


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
