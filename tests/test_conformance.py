"""What every method, dynamics and learner keeps to, in one table: pure, traced once, compiled, exact, stopped early.

A row is one problem of two weights (learners: one task of three examples), traced once. The default run has every
method, every dynamics and most learners once for what its trace tells, and a few of them for what needs another trace;
the cross product is slow.
"""

import dataclasses
import itertools
import re
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close, variable

import farhox
from farhox import meta
from farhox.dynamics import L1, BacktrackingGradientDescent, ProximalGradient
from farhox.hypergradients import DartsHG, EpisodesHG, EvoGradHG, InitialHG, ObjectivesHG, ReptileHG, ReversibleHG
from farhox.linear_solvers import Direct

# What a method sees: settings of the dynamics and the path ("path"), what the objectives depend on ("objectives"),
# initial values ("start").
METHODS = {
    "reverse": (farhox.ReverseHG(), "path"),
    "checkpoints": (farhox.ReverseHG(checkpoint_every=2), "path"),
    "forward": (farhox.ForwardHG(), "path"),
    "implicit": (farhox.ImplicitHG(Direct()), "objectives"),
    "reversible": (ReversibleHG(), "path"),
    "darts": (DartsHG(), "path"),
    "evograd": (EvoGradHG(perturbations=6, sigma=0.1), "objectives"),
    "objectives": (ObjectivesHG(farhox.ReverseHG(), [(lambda goal: goal, [])]), "path"),  # Filled in below.
    "episodes": (EpisodesHG(farhox.ReverseHG()), "path"),
    "reptile": (ReptileHG(), "start"),
    "initial": (InitialHG(), "start"),
}
DYNAMICS = {
    "gradient descent": farhox.GradientDescent,
    "momentum": lambda rate: farhox.Momentum(rate, 0.5),
    "nesterov": lambda rate: farhox.Momentum(rate, 0.5, nesterov=True),
    "adam": lambda rate: farhox.Adam(rate, epsilon=0.1),
    "keras": lambda rate: farhox.KerasDynamics(keras.optimizers.RMSprop(rho=0.5, epsilon=0.1), learning_rate=rate),
    "proximal": lambda rate: ProximalGradient(rate, penalty=L1(0.1)),
    "line search": lambda rate: BacktrackingGradientDescent(learning_rate=1.0, decrease=0.5, shrink=0.5),
}
# What does not go together, and what the error says.
REFUSED = {**{("reversible", name): "ReversibleHG undoes farhox.Momentum without nesterov"
              for name in DYNAMICS if name != "momentum"},
           ("implicit", "proximal"): "needs dynamics that rest where the inner gradient is zero"}
# Implicit differentiation is exact at rest: these dynamics come to rest at a minimum in as many steps. A search by the
# loss ends where the loss falls by no more than rounding, which is the square root of it from the minimum.
AT_REST = ("gradient descent", "momentum", "nesterov")
# A random estimate, and directions that are no gradients of the outer loss of the trained weights.
NO_DERIVATIVE = ("evograd", "reptile", "initial")


@dataclasses.dataclass
class Row:
    """A problem, its data, and what one compiled function gave of them.

    Attributes:
        compute: The function (inner batches, outer batch) -> `HyperGradientResult`.
        data: Two pairs of the same shapes.
        variables: All variables of the problem.
        traces: List with an entry per trace of the inner objective's caller.
        results: For each pair the result.
        changed: Whether a variable changed meanwhile.
    """

    problem: Any
    method: Any
    data: Any
    compute: Any = None
    variables: Any = None
    traces: list = dataclasses.field(default_factory=list)
    results: Any = None
    changed: Any = None

    def run(self):
        def compute(inner_batches, outer_batch):
            self.traces.append(1)
            return self.method.compute(self.problem, inner_batches, outer_batch)

        self.compute = tf.function(compute, autograph=False)
        inner = self.problem.inner_variables + self.problem.state_variables
        self.variables = list({id(v): v for v in [*inner, *self.problem.outer_variables]}.values())
        before = [v.numpy() for v in self.variables]
        self.results = [self.compute(*pair) for pair in self.data]
        self.changed = any(np.any(v.numpy() != value) for v, value in zip(self.variables, before))
        return self


def two_weights(method, make, steps=4, features=False, share=True, episodes=2, **settings):
    """A problem of two weights under a quadratic and a quartic term, for a method.

    Returns:
        A `Row` that has not run.
    """
    hypergradient, sees = METHODS[method]
    w, target, rate = variable([1.5, -0.5], name="w"), variable([0.4, 0.2], name="target"), variable(0.1, name="rate")
    own = [] if make is DYNAMICS["line search"] or sees != "path" else [rate]
    outer = [w] if sees == "start" else [target, *own]

    def inner_objective(batch):
        batch = batch if features and share else target[0] * batch if features else batch
        return keras.ops.mean(batch * (w - target) ** 2) / 2 + 0.05 * keras.ops.sum(w ** 4)

    def outer_objective(goal):
        return keras.ops.sum((w - goal) ** 2) / 2

    if features and share:
        settings["features"] = lambda batch: target[0] * batch
    if method == "objectives":
        hypergradient = dataclasses.replace(hypergradient, objectives=[(outer_objective, [target])])
    problem = farhox.BilevelProblem(inner_objective, outer_objective, [w], outer, make(rate), **settings)
    batch, batches = tf.constant([1.0, 2.0], tf.float64), tf.constant(np.linspace(2.0, 1.0, 12).reshape(6, 2)[:steps])
    goal = tf.constant(1.0, tf.float64)
    if hypergradient.takes_episodes:
        batch, batches, goal = (tf.stack([leaf * (1 - 0.1 * i) for i in range(episodes)])
                                for leaf in (batch, batches, goal))
    if features or method == "implicit":
        batches = farhox.repeat(batch, steps)
    other = tf.nest.map_structure(lambda leaf: leaf if leaf.dtype.is_integer else 1.5 * leaf, batches)
    return Row(problem, hypergradient, [(batches, goal), (other, 2.0 * goal)])


# Every method and every dynamics once; the other cells are slow.
FAST = {("reverse", "adam"), ("checkpoints", "keras"), ("forward", "proximal"), ("implicit", "gradient descent"),
        ("reversible", "momentum"), ("darts", "gradient descent"), ("evograd", "nesterov"),
        ("objectives", "line search"), ("episodes", "gradient descent"), ("reptile", "momentum"),
        ("initial", "gradient descent")}


def cells(fast):
    return pytest.mark.parametrize("method, name", [
        pytest.param(*cell, marks=[] if cell in fast else pytest.mark.slow)
        for cell in itertools.product(METHODS, DYNAMICS)])


over_cells = cells(FAST)


@pytest.fixture(scope="module")
def rows():
    """Rows by method and dynamics, each run once."""
    made = {}

    def row(method, name):
        if (method, name) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[method, name]):
                two_weights(method, DYNAMICS[name]).run()
            pytest.skip("refused by name")
        if (method, name) not in made:
            # Implicit differentiation is told of the end of a training alone.
            steps = 800 if method == "implicit" else 4
            made[method, name] = two_weights(method, DYNAMICS[name], steps).run()
        return made[method, name]

    return row


def assert_pure_and_traced_once(row):
    assert not row.changed
    assert len(row.traces) == 1
    first, second = row.results
    assert any(np.any(a != b) for a, b in zip(first.gradients, second.gradients))


def assert_differences(row, tolerance, step=1e-5):
    """The traced function again at values to both sides, along a direction in all outer variables."""
    outer = row.problem.outer_variables
    gradients = row.results[0].gradients
    random = np.random.default_rng(0)
    directions = [random.normal(size=v.shape) for v in outer]
    values, losses = [v.numpy() for v in outer], []
    for sign in (1.0, -1.0):
        for own, value, direction in zip(outer, values, directions):
            own.assign(value + sign * step * direction)
        losses.append(np.mean(row.compute(*row.data[0]).outer_loss))
    for own, value in zip(outer, values):
        own.assign(value)
    expected = (losses[0] - losses[1]) / (2 * step)
    actual = sum(np.sum(g * d) for g, d in zip(gradients, directions))
    assert abs(expected) > 1e-6
    np.testing.assert_allclose(actual, expected, rtol=tolerance)
    assert len(row.traces) == 1


@pytest.mark.optimized
@over_cells
def test_no_variable_changes_and_one_trace_serves_all_data_and_values(method, name, rows):
    assert_pure_and_traced_once(rows(method, name))


@cells({("reverse", "adam"), ("forward", "proximal")})
def test_an_eager_computation_is_that_of_a_graph(method, name, rows):
    row = rows(method, name)
    result, eager = row.results[0], row.method.compute(row.problem, *row.data[0])
    tf.nest.assert_same_structure(result, eager)
    for a, b in zip(tf.nest.flatten(result), tf.nest.flatten(eager)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14)


@over_cells
def test_result_and_memory_have_the_structure_that_was_announced(method, name, rows):
    row = rows(method, name)
    result = row.results[0]
    announced = row.method.initial_carry(row.problem)
    tf.nest.assert_same_structure(announced, result.carry)
    assert [(leaf.dtype, leaf.shape) for leaf in tf.nest.flatten(announced)] == [
        (leaf.dtype, leaf.shape) for leaf in tf.nest.flatten(result.carry)]
    assert [g.shape for g in result.gradients] == [v.shape for v in row.problem.outer_variables]
    assert {"finite", "inner_gradient_norm", "inner_steps", "hypergradient_norm"} <= set(result.diagnostics)
    assert np.all(result.diagnostics["finite"])


@over_cells
def test_hypergradient_is_that_of_central_differences(method, name, rows):
    if method in NO_DERIVATIVE:
        pytest.skip("no derivative of the outer loss after training")
    if method == "implicit" and name not in AT_REST:
        pytest.skip("the training does not come to rest")
    row = rows(method, name)
    if method == "darts":  # One step is the whole training.
        row = two_weights(method, DYNAMICS[name], steps=1).run()
    assert_differences(row, 1e-3 if method == "darts" else 1e-6)


@cells({("reverse", "adam"), ("implicit", "gradient descent")})
def test_computation_compiles_under_xla(method, name, rows):
    row = rows(method, name)
    compiled = tf.function(row.method.compute, autograph=False, jit_compile=True)(row.problem, *row.data[0])
    assert_close(compiled.gradients, row.results[0].gradients, 1e-8)


@cells({("reverse", "adam")})
def test_early_stop_equals_a_training_of_as_many_steps(method, name):
    if method == "initial":
        pytest.skip("takes no step")
    if (method, name) in REFUSED:
        pytest.skip("refused by name")
    three = two_weights(method, DYNAMICS[name], 3, episodes=1)
    expected = three.method.compute(three.problem, *three.data[0])
    # The norm of the gradient falls, and the step that finds it below the tolerance is the last one.
    tolerance = 1.0001 * float(expected.diagnostics["inner_gradient_norm"])
    six = two_weights(method, DYNAMICS[name], 6, episodes=1, stop_tolerance=tolerance)
    stopped = six.method.compute(six.problem, *six.data[0])
    assert stopped.diagnostics["inner_steps"] == 3
    assert_close(stopped.gradients, expected.gradients, 1e-12)
    assert_close([stopped.outer_loss], [expected.outer_loss], 1e-14)


@cells({("implicit", "gradient descent")})
def test_features_that_are_shared_change_nothing(method, name):
    if (method, name) in REFUSED:
        pytest.skip("refused by name")
    gradients = []
    for share in (True, False):
        row = two_weights(method, DYNAMICS[name], steps=3, features=True, share=share)
        gradients.append(row.method.compute(row.problem, *row.data[0]).gradients)
    assert_close(gradients[0], gradients[1], 1e-10)


def scaled(*before):
    """A network for tasks of one input: x -> b tanh(a x + c), behind layers that may come before."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.Input([1]), *before, keras.layers.Dense(1, "tanh"), keras.layers.Dense(1, use_bias=False)])


MSE = "mean_squared_error"
LEARNERS = {
    "MAML": lambda: meta.MAML(scaled(), 0.3, 2, loss=MSE),
    "FOMAML": lambda: meta.MAML(scaled(), 0.3, 2, first_order=True, loss=MSE),
    "MAML++": lambda: meta.MAMLPlusPlus(scaled(), 0.3, 2, annealing_steps=1, loss=MSE),
    "ANIL": lambda: meta.ANIL(scaled(), None, 0.3, 2, loss=MSE),
    "IMAML": lambda: meta.IMAML(scaled(), 0.3, 200, proximal=2.0, linear_solver=Direct(), loss=MSE),
    "Reptile": lambda: meta.Reptile(scaled(), farhox.GradientDescent(0.3), 2, loss=MSE),
    "HyperRepresentation": lambda: meta.HyperRepresentation(
        keras.Sequential([keras.Input([1]), keras.layers.Dense(1, "tanh")]), keras.layers.Dense(1), 0.3, 2, loss=MSE),
    "JointTraining": lambda: meta.JointTraining(scaled(), 0.3, 2, loss=MSE),
    "MetaCurvature": lambda: meta.MetaCurvature(scaled(), 0.3, 2, loss=MSE),
    "CAVIA": lambda: meta.CAVIA(scaled(meta.TaskContext(1)), None, 0.3, 2, loss=MSE),
}
# Their direction is not the derivative of the loss that they report: see test_meta_learners.
DIRECTIONS = ("FOMAML", "Reptile", "JointTraining")
# Each of these is another one with a step left out; other tests compare them with closed forms and loops.
SIMPLER = ("FOMAML", "ANIL", "HyperRepresentation", "JointTraining")
learners = pytest.mark.parametrize("learner", [
    pytest.param(name, marks=pytest.mark.slow) if name in SIMPLER else name for name in LEARNERS])


@pytest.fixture(scope="module")
def learner_rows():
    """Rows by learner, each run once."""
    made = {}
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")

    def row(name):
        if name not in made:
            learner = LEARNERS[name]()
            learner.compile(keras.optimizers.SGD(0.1))
            learner.optimizer.iterations.assign(1)  # Losses of early steps have faded.
            random = np.random.default_rng(0)
            tasks = [meta.Episode(*[(tf.constant(random.normal(size=[2, n, 1])), tf.constant(
                random.normal(size=[2, n, 1]))) for n in (3, 4)]) for _ in range(2)]
            data = [learner._hyper_iteration_data(task, training=True) for task in tasks]
            made[name] = Row(learner.problem, learner.hypergradient, data).run()
        return made[name]

    yield row
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


@learners
def test_a_learner_changes_no_variable_and_is_traced_once_for_all_tasks(learner, learner_rows):
    assert_pure_and_traced_once(learner_rows(learner))


@learners
def test_the_memory_of_a_learner_has_the_structure_that_was_announced(learner, learner_rows):
    row = learner_rows(learner)
    announced = row.method.initial_carry(row.problem)
    tf.nest.assert_same_structure(announced, row.results[0].carry)


@learners
def test_the_meta_gradient_of_a_learner_is_that_of_central_differences(learner, learner_rows):
    if learner in DIRECTIONS:
        pytest.skip("a direction that is no derivative")
    assert_differences(learner_rows(learner), 1e-6)


@pytest.mark.slow
@pytest.mark.one_case
@learners
def test_a_learner_compiles_under_xla(learner, learner_rows):
    row = learner_rows(learner)
    compiled = tf.function(row.method.compute, autograph=False, jit_compile=True)(row.problem, *row.data[0])
    assert_close(compiled.gradients, row.results[0].gradients, 1e-8)


def test_every_method_dynamics_and_learner_of_the_package_is_in_the_table():
    assert {method for method, _ in FAST} == set(METHODS) and {name for _, name in FAST} == set(DYNAMICS)
    methods = {type(method).__name__ for method, _ in METHODS.values()}
    abstract = {"HyperGradient", "HyperGradientResult", "Memory", "SingleHyperGradient", "result"}
    assert methods == set(farhox.hypergradients.__all__) - abstract
    dynamics = {type(make(0.1)).__name__ for make in DYNAMICS.values()}
    kinds = {name for name in farhox.dynamics.__all__ if issubclass(
        getattr(farhox.dynamics, name), farhox.dynamics.InnerDynamics)}
    assert dynamics == kinds - {"InnerDynamics"}
    learned = {name for name in meta.__all__ if isinstance(getattr(meta, name), type) and issubclass(
        getattr(meta, name), meta.Learner)}
    assert learned - {"Learner"} == {re.sub("^FOMAML$", "MAML", name).replace("++", "PlusPlus") for name in LEARNERS}
