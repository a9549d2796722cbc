"""jit_compile="auto": measured once, said in one line, and never another result."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close, model_and_data, scalar_quadratic, variable

import farhox
from farhox.training import compilation


@pytest.fixture
def always(monkeypatch):
    """XLA is faster, whatever the clock says."""
    monkeypatch.setattr(compilation, "_WORTH", float("inf"))


@pytest.fixture
def never(monkeypatch):
    """XLA is slower."""
    monkeypatch.setattr(compilation, "_WORTH", 0.0)


def trained(jit_compile, online=True, steps_per_execution=1, outer_objective=None, **options):
    """A training over data that are shuffled anew in each epoch: what is read once too often changes all of it."""
    case = scalar_quadratic(outer=("target", "rate"), steps=2)
    if outer_objective is not None:
        (w,), target = case.problem.inner_variables, case.problem.outer_variables[0]
        case = case._replace(problem=farhox.BilevelProblem(
            lambda a: a / 2 * keras.ops.square(w - target), lambda goal: outer_objective(w, goal), [w], [target],
            dynamics=farhox.GradientDescent(0.1)))
    optimizer = farhox.HyperOptimizer(case.problem, online=online)
    optimizer.compile(keras.optimizers.SGD(0.05, momentum=0.5), jit_compile=jit_compile,
                      steps_per_execution=steps_per_execution, **options)
    inner = np.stack([[0.5, 1.0], [1.0, 0.8], [0.3, 0.7], [0.9, 1.1], [0.2, 0.4]])
    data = tf.data.Dataset.from_tensor_slices((inner, np.arange(5.0))).shuffle(5, seed=1)
    history = optimizer.fit(data, epochs=2, verbose=0)
    return optimizer, [history.history["outer_loss"], *(v.numpy() for v in case.problem.outer_variables),
                       *(v.numpy() for v in case.problem.inner_variables), *(
                           v.numpy() for v in optimizer.optimizer.variables)]


@pytest.mark.parametrize("steps_per_execution", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_training_that_was_measured_is_the_one_that_was_not(steps_per_execution, never, capsys, float64):
    _, expected = trained(False, steps_per_execution=steps_per_execution)
    assert capsys.readouterr().out == ""
    optimizer, found = trained("auto", steps_per_execution=steps_per_execution)
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == optimizer.jit_choice and not optimizer.jit_compile
    assert line.startswith('jit_compile="auto": without XLA. A hyper-iteration takes ') and line.endswith(" without.")
    assert optimizer.hyper_iterations == 10


@pytest.mark.slow
def test_xla_is_chosen_where_it_is_faster(always, capsys, float64):
    optimizer, found = trained("auto")
    assert optimizer.jit_compile is True and optimizer.jit_choice.startswith('jit_compile="auto": with XLA. A hyper')
    assert_close(found, trained(False)[1], 1e-12)
    before = capsys.readouterr().out
    optimizer.fit((np.ones([2]), np.ones([])), verbose=0)  # It is measured once.
    assert len(before.splitlines()) == 1 and capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_step_by_hand_is_measured_too(always, capsys, float64):
    results = []
    for jit_compile in ("auto", False):
        case = scalar_quadratic(outer=("target", "rate"))
        optimizer = farhox.HyperOptimizer(case.problem)
        optimizer.compile(keras.optimizers.SGD(0.1), jit_compile=jit_compile)
        assert optimizer.jit_choice is None
        results += [optimizer.step(*case[1:3]).gradients, case.problem.outer_variables]
        assert optimizer.jit_compile is (jit_compile == "auto") and optimizer.hyper_iterations == 1
    assert_close(results[0], results[2], 1e-12)
    assert_close(results[1], results[3], 1e-12)
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.slow
def test_a_training_that_draws_stays_as_it_is(always, float64):
    model, inner_batches, outer_batch = model_and_data("Dropout", steps=2)
    problem = farhox.supervised_problem(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                                        farhox.GradientDescent(rate := variable(0.3)), [rate])
    optimizer = farhox.HyperOptimizer(problem)
    optimizer.compile(keras.optimizers.SGD(0.1), jit_compile="auto")
    optimizer.step(inner_batches, outer_batch)
    assert not optimizer.jit_compile
    assert "under which the hypergradient is another one (relative difference" in optimizer.jit_choice


@pytest.mark.slow
def test_what_xla_cannot_compile_is_said_and_runs_without(always, float64):
    def through_text(w, goal):
        return keras.ops.square(w - tf.strings.to_number(tf.strings.as_string(goal), tf.float64)) / 2

    optimizer, found = trained("auto", outer_objective=through_text)
    assert not optimizer.jit_compile and "without XLA, which cannot compile it: " in optimizer.jit_choice
    assert "\n" not in optimizer.jit_choice
    for a, b in zip(found, trained(False, outer_objective=through_text)[1]):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_measured_where_functions_run_eagerly(float64):
    optimizer, _ = trained("auto", run_eagerly=True)
    assert optimizer.jit_choice == 'jit_compile="auto": without XLA, which is not measured with run_eagerly.'
    assert not optimizer.jit_compile and optimizer.hyper_iterations == 10


def test_labels_out_of_range_are_the_error_that_they_are_without_xla(float64):
    model, (x, y), outer_batch = model_and_data("Dense", steps=2)
    rate = variable(0.3)
    problem = farhox.supervised_problem(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                                        farhox.GradientDescent(rate), [rate])
    optimizer = farhox.HyperOptimizer(problem)
    optimizer.compile(keras.optimizers.SGD(0.1), jit_compile="auto")
    with pytest.raises(ValueError, match="abels"):
        optimizer.step((x, y + 100), outer_batch)
    assert optimizer.jit_choice is None


@pytest.mark.parametrize("value", [None, "yes", 2, "Auto"])
def test_jit_compile_must_be_a_bool_or_auto(value):
    optimizer = farhox.HyperOptimizer(scalar_quadratic().problem)
    with pytest.raises(ValueError, match='jit_compile must be True, False or "auto". Received: '):
        optimizer.compile(keras.optimizers.SGD(0.1), jit_compile=value)
