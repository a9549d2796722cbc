"""The package as a whole: its names, and the backend that it needs."""

import ast
import inspect
import pathlib
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
    **{name: f"farhox.dynamics.{name}" for name in (
        "BacktrackingGradientDescent", "InnerDynamics", "ProximalGradient")},
    **{name: f"farhox.constraints.{name}" for name in ("Box", "CappedSimplex", "Simplex")},
    "Dense": "farhox.linear_solvers.Direct", "InnerState": "farhox.problem.InnerState",
    "OptimizerGroups": "farhox.training.OptimizerGroups", "health": "farhox.insight.health",
    "k_fold_dataset": "farhox.data.k_fold_dataset"}
PUBLIC_ROOMS = [getattr(farhox, name) for name in farhox.__all__ if isinstance(getattr(farhox, name), types.ModuleType)]


def test_the_public_face_is_about_25_names_beside_the_rooms():
    names = [name for name in farhox.__all__ if not isinstance(getattr(farhox, name), types.ModuleType)]
    assert len(names) == 23 and len(PUBLIC_ROOMS) == 15
    assert dir(farhox) == sorted([*farhox.__all__, "__version__"])
    public = {name for name, value in vars(farhox).items()
              if not name.startswith("_") and not isinstance(value, types.ModuleType)}
    assert public == set(names)


@pytest.mark.parametrize("room", [farhox, *PUBLIC_ROOMS], ids=lambda room: room.__name__)
def test_the_declared_names_of_a_room_are_there_sorted_and_documented(room):
    assert list(room.__all__) == sorted(set(room.__all__))
    assert [name for name in room.__all__ if not (getattr(room, name).__doc__ or "").strip()] == []


def signatures(room):
    """Name and signature of each function, class and public method of a room, as far as farhox writes it."""
    for name in room.__all__:
        value = getattr(room, name)
        parts = {name: value}
        if isinstance(value, type):
            parts = {f"{name}.{part}": getattr(entry, "__func__", getattr(entry, "fget", entry))
                     for part, entry in vars(value).items() if part in ("__init__", "__call__") or part[0] != "_"}
        for part, function in parts.items():
            if inspect.isfunction(function) and function.__module__.startswith("farhox."):
                yield part, inspect.signature(function)


@pytest.mark.parametrize("room", [farhox, *PUBLIC_ROOMS], ids=lambda room: room.__name__)
def test_every_parameter_and_result_of_a_public_function_and_every_field_has_a_type(room):
    empty, untyped = inspect.Signature.empty, []
    for name, signature in signatures(room):
        # The constructors of dataclasses and named tuples have the types of their fields.
        untyped += [f"{name}({parameter})" for parameter in signature.parameters.values()
                    if parameter.annotation is empty and parameter.name not in ("self", "cls", "_cls")]
        untyped += [f"{name} -> ?" for _ in range(signature.return_annotation is empty)]
    assert untyped == []


def test_style_is_clean():
    pytest.importorskip("ruff", reason="ruff is not installed: pip install '.[test]'")
    root = pathlib.Path(__file__).resolve().parents[1]
    found = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", str(root)],
                           capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_package_says_that_it_is_typed():
    assert (pathlib.Path(farhox.__file__).parent / "py.typed").exists()


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
        getattr(room, "Denze")  # noqa: B009


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


def imported_at_once(tree):
    """Names of the modules that a module imports when it is imported itself, not later in a function."""
    names, waiting = set(), list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return {name.split(".")[0] for name in names}


def test_importing_farhox_imports_nothing_beside_tensorflow_keras_numpy_and_python():
    files = list(pathlib.Path(farhox.__file__).parent.rglob("*.py"))
    imported = set().union(*(imported_at_once(ast.parse(file.read_text(encoding="utf-8"))) for file in files))
    # Of google protobuf alone, which TensorFlow's graphs are written with and which TensorFlow brings.
    assert {"tensorflow", "keras", "numpy", "google", "farhox"} == imported - set(sys.stdlib_module_names)


@pytest.mark.slow
def test_import_of_farhox_loads_no_module_beyond_those_of_tensorflow_and_keras():
    code = ("import sys, tensorflow, keras; before = set(sys.modules); import farhox; "
            "print(*{name.split('.')[0] for name in set(sys.modules) - before})")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert set(run.stdout.split()) - set(sys.stdlib_module_names) == {"farhox"}
