"""The bilevel problem: what is trained inside, and what is learned outside."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from farhox._core import checks
from farhox._core.inner_state import InnerState
from farhox._core.retraced import Retraced
from farhox._core.types import Batch, InnerBatches, Nest, Objective, Tensor
from farhox.dynamics.base import GradientDescent, InnerDynamics
from farhox.outer.hyperparameters import ExampleWeights, LearnedSchedule
from farhox.outer.outer_variable import OuterVariable
from farhox.problem.evaluation import Evaluation, evaluate, predictions_of
from farhox.problem.maps import Maps
from farhox.problem.memory_plan import memory_plan
from farhox.problem.read import found_outer_variables

if TYPE_CHECKING:
    from farhox.problem.memory_plan import MemoryPlan


class BilevelProblem(Maps):
    """Minimise E(w_T(λ), λ) over λ, where w_T is what T steps of inner training make of the inner variables.

    Objectives are ordinary Keras code, `batch -> scalar tensor`, and close over models and variables. Which variables
    are inner (w, trained by the dynamics) and which are outer (λ, learned by hypergradients) is said here, once. A
    variable named as both is learned as an initial value.

    ```python
    problem = farhox.BilevelProblem(
        inner_objective=lambda batch: loss(batch[1], model(batch[0], training=True)) + strength() * penalty(),
        outer_objective=lambda batch: loss(batch[1], model(batch[0], training=False)),
        inner_variables=model.trainable_variables,
        outer_variables=[learning_rate, strength],
        state_variables=model.non_trainable_variables,
        dynamics=farhox.GradientDescent(learning_rate))
    ```

    Args:
        inner_objective: Callable `batch -> scalar`, minimised by the dynamics.
        outer_objective: Callable `batch -> scalar`, minimised over the outer variables.
        inner_variables: List of floating-point `keras.Variable`.
        outer_variables: List of floating-point `keras.Variable` and `OuterVariable`: `Hyperparameter`,
            `ExampleWeights`, `LearnedSchedule` and your own. Or "all": every `OuterVariable` that the objectives and
            the dynamics read but those in `fixed`, found by tracing them with `example_batches`.
        dynamics: An `InnerDynamics`. Settings that are hyperparameters must be named in `outer_variables` too if they
            are to be learned.
        state_variables: List of `keras.Variable` that the inner objective assigns: batch-norm statistics, seeds of
            dropout. They are part of the inner state. Default: none.
        proximal: Float or `OuterVariable` ρ, adds ρ/2 ||w - w_0||^2 to the inner objective. Default: none.
        outer_predictions: Callable `batch -> (targets, predictions, sample_weight or None)` of the outer objective's
            model, for metrics. Default: none.
        features: Callable `inner batch -> nest of tensors`, the part of the inner objective that depends on the batch
            and the outer variables, but neither on inner nor on state variables; the inner objective is given what it
            returns in the place of the batch. Where all steps have the same batch (`farhox.repeat`), `ReverseHG` and
            `ImplicitHG` compute it once. What it assigns is dropped. Default: none.
        stop_gradient: "exact" or "tensorflow", what `tf.stop_gradient` in the inner objective means. It always stops
            the inner gradient, as in any training. With "exact" its value is data that flows from step to step, and
            the hypergradient is the derivative of the training that happens; with "tensorflow" it is a constant for
            the hypergradient too, which is how some papers define theirs.
        stop_tolerance: Positive float: inner training ends after the first step at whose start the norm of the inner
            gradient was below it, and T is the most it can take. A proximal step counts instead of the gradient with
            what it moved by, over the learning rate, and under a Keras constraint w - constraint(w - g), which are zero
            at a minimum where the gradient is not. Or a callable `hyper-iteration -> number`, for a tolerance that
            tightens. Default: none, always T steps.
        model: A `keras.Model` that the variables were taken from. Where other variables of it are trainable later on,
            the problem does not fit it any more, and its use is an error. Default: none.
        fixed: List of `OuterVariable` that are read and stay as they are. Of others that something reads and nobody
            named a warning tells. Default: none.
        example_batches: (inner batch, outer batch) of arrays or `tf.TensorSpec`, for `outer_variables="all"`.
        allow_unused: Bool. Inner and outer variables on which nothing depends are no error: their gradient is zero.
        check_data: Callable of a nest of inner examples (an inner batch, or one with further leading axes) and an
            outer batch, or None for either, that returns a list of tensors or operations, assertions on the data: for
            checks that XLA leaves out of an objective. Default: none.

    Attributes:
        inner_variables, state_variables, stop_tolerance, model, allow_unused: As given.
        outer_variables: Flat list of `keras.Variable`, the order of every list of hypergradients.
        hyperparameters: The entries of `outer_variables` that have natural units.
        dynamics: As given, bound to the inner variables.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a list is empty or names a variable twice, or a variable is not floating-point.

    Reference:
        [Franceschi et al., 2018](https://arxiv.org/abs/1806.04910), equations 1 to 4.
    """

    def __init__(self, inner_objective: Objective, outer_objective: Objective,
                 inner_variables: Sequence[keras.Variable],
                 outer_variables: str | Sequence[keras.Variable | OuterVariable], dynamics: InnerDynamics | None = None,
                 state_variables: Sequence[keras.Variable] | None = None, proximal: float | OuterVariable | None = None,
                 outer_predictions: Callable[..., Any] | None = None,
                 stop_tolerance: float | Callable[[Tensor], Any] | None = None,
                 features: Callable[[Batch], Nest] | None = None, model: keras.Model | None = None,
                 fixed: Sequence[OuterVariable] | None = None, example_batches: bool | None = None,
                 stop_gradient: str = "exact", allow_unused: bool = False,
                 check_data: Callable[..., Any] | None = None) -> None:
        for name, objective in (("inner_objective", inner_objective), ("outer_objective", outer_objective)):
            if not callable(objective):
                raise TypeError(f"{name} must be a callable batch -> scalar. Received: {objective!r}")
        if features is not None and not callable(features):
            raise TypeError(f"features must be a callable inner batch -> nest of tensors. Received: {features!r}")
        dynamics = GradientDescent() if dynamics is None else dynamics
        if not isinstance(dynamics, InnerDynamics):
            raise TypeError("dynamics must be one of farhox' dynamics, for example farhox.GradientDescent(0.1) or "
                            "farhox.KerasDynamics(optimizer). "
                            f"Received: {dynamics!r} of type {type(dynamics).__name__}")
        if proximal is not None and (isinstance(proximal, (bool, ExampleWeights, LearnedSchedule)) or not isinstance(
                proximal, (numbers.Real, OuterVariable))):
            raise TypeError(f"proximal must be a float, a farhox.Hyperparameter or None. Received: {proximal!r}")
        if isinstance(proximal, numbers.Real) and not 0 <= proximal < float("inf"):
            raise ValueError(f"proximal must be finite and not negative. Received: {proximal}")
        if stop_tolerance is not None and not callable(stop_tolerance) and not (
                checks.is_number(stop_tolerance) and 0 < stop_tolerance < float("inf")):
            raise ValueError("stop_tolerance must be a positive number, a callable hyper-iteration -> number or None. "
                             f"Received: {stop_tolerance!r}")
        if stop_gradient not in ("exact", "tensorflow"):
            raise ValueError(f"stop_gradient must be 'exact' or 'tensorflow'. Received: {stop_gradient!r}")
        self.inner_variables = _checked_variables("inner_variables", inner_variables)
        self.dynamics = dynamics.bound_to(self.inner_variables)
        self.fixed = list(fixed or [])
        if isinstance(outer_variables, str):
            if outer_variables != "all":
                raise ValueError(f"outer_variables must be a list or 'all'. Received: {outer_variables!r}")
            outer_variables = found_outer_variables(
                inner_objective, outer_objective, self.dynamics, self.inner_variables, proximal, features,
                example_batches, self.fixed, [] if model is None else model.trainable_variables)
        self.outer_variables = _checked_variables("outer_variables", outer_variables)
        self.hyperparameters = [entry for entry in outer_variables if isinstance(entry, OuterVariable)]
        self.state_variables = _checked_variables("state_variables", state_variables or [], state=True)
        self.proximal = proximal
        self.outer_predictions: Any = outer_predictions
        self.stop_tolerance: Any = stop_tolerance
        if stop_tolerance is not None and not self.dynamics.rests_at_minimum:
            raise ValueError(
                f"stop_tolerance needs dynamics that come to rest where the inner gradient is zero. "
                f"{type(self.dynamics).__name__} does not here, because of a weight decay that is no part of the inner "
                "objective: the gradient never falls below a tolerance. Make it a part, as farhox.L1L2(l2=...), or "
                f"train without stop_tolerance. Received: stop_tolerance={stop_tolerance!r}")
        self.stop_gradient = stop_gradient
        self._compiled = {}
        # What the batch of an inner step was like in the last training, a nest of `tf.TensorSpec`.
        self.last_batch = None
        # Batches have no axis of episodes: `over_episodes` adds one.
        self.one_episode: BilevelProblem = self
        self._aggregation: Any = None
        self.parallel_iterations = 1
        self._inner_objective = inner_objective
        self.allow_unused = bool(allow_unused)
        self._features: Any = features
        self._outer_objective = outer_objective
        self.model: Any = model
        self._check_data = check_data
        self._trainable = [] if model is None else list(model.trainable_variables)
        known = [*self.outer_variables, *_checked_variables("fixed", self.fixed, state=True)]
        self._known = {id(variable) for variable in known}
        outer_index = {id(variable): i for i, variable in enumerate(self.outer_variables)}
        self._learned = [outer_index.get(id(variable)) for variable in self.inner_variables]
        for variable in self.state_variables:
            if id(variable) in outer_index or any(variable is v for v in self.inner_variables):
                raise ValueError("A state variable must not be an inner or an outer variable. "
                                 f"Received: {variable.path!r}")

    def tolerance(self, iteration: Tensor) -> float | Tensor | None:
        """The tolerance at which the inner training of a hyper-iteration stops: a number, a scalar tensor, or None."""
        return self.stop_tolerance(iteration) if callable(self.stop_tolerance) else self.stop_tolerance

    @property
    def learns_initialization(self) -> bool:
        """Whether an inner variable is an outer variable too."""
        return any(index is not None for index in self._learned)

    def with_outer(self, outer_objective: Objective,
                   outer_variables: Sequence[keras.Variable | OuterVariable]) -> BilevelProblem:
        """The same inner problem under another outer objective, for some of the outer variables.

        The others count as constants.

        Args:
            outer_objective: Callable `batch -> scalar`.
            outer_variables: List as for the constructor.

        Returns:
            A `BilevelProblem`.
        """
        return BilevelProblem(
            self._inner_objective, outer_objective, self.inner_variables, outer_variables, dynamics=self.dynamics,
            state_variables=self.state_variables, proximal=self.proximal, outer_predictions=self.outer_predictions,
            stop_tolerance=self.stop_tolerance, features=self._features, model=self.model, check_data=self._check_data,
            fixed=[*self.outer_variables, *self.fixed], stop_gradient=self.stop_gradient,
            allow_unused=self.allow_unused)

    def under(self, outer_objective: Objective) -> BilevelProblem:
        """The same problem with all its outer variables under another outer objective.

        Args:
            outer_objective: Callable `batch -> scalar`.

        Returns:
            A `BilevelProblem`, without predictions for metrics.
        """
        other = copy.copy(self)
        other._outer_objective, other.outer_predictions, other._compiled = outer_objective, None, {}
        return other

    def over_episodes(self, aggregation: Callable[[Tensor], Tensor] | None = None,
                      parallel_iterations: int = 1) -> BilevelProblem:
        """The same problem for batches with one more axis: meta-batches, folds of a cross-validation.

        Every tensor of the inner batches and of the outer batch has an additional leading axis of episodes (for
        `gather` the indices have, and the arrays are shared: [episodes, T, batch]). Each episode starts from the same
        Φ_0(λ) and is trained on its own; memory is that of one episode. Every method computes for such a problem what
        it computes for one episode: in its result `outer_loss` is the aggregated scalar, `inner_losses` is
        [episodes, T], the tensors of `state` and `carry` have the leading axis of episodes, and diagnostics are means
        over episodes ("finite": of all).

        Args:
            aggregation: Callable, tensor [episodes, ...] to tensor [...], for hypergradients and the outer loss.
                Default: the mean.
            parallel_iterations: Positive int, episodes that are computed at the same time where TensorFlow may use
                several threads, at the price of their memory. The numbers are the same. XLA takes one at a time.

        Returns:
            A `BilevelProblem`.

        Raises:
            TypeError: If `aggregation` is not callable.
            ValueError: If `parallel_iterations` is not a positive integer.

        Reference:
            [Franceschi et al., 2018](https://arxiv.org/abs/1806.04910), equation 3.
        """
        if aggregation is not None and not callable(aggregation):
            raise TypeError(f"aggregation must be a callable [episodes, ...] -> [...]. Received: {aggregation!r}")
        over = copy.copy(self)
        over.one_episode = self.one_episode
        over._aggregation = aggregation or (lambda values: tf.reduce_mean(values, axis=0))
        over.parallel_iterations = checks.positive_integer("parallel_iterations", parallel_iterations)
        over._compiled = {}
        return over

    @property
    def has_episodes(self) -> bool:
        """Whether batches have a leading axis of episodes; see `over_episodes`."""
        return self._aggregation is not None

    def in_parallel(self, parallel_iterations: int) -> BilevelProblem:
        """A problem `over_episodes` with another number of them at the same time."""
        return self.one_episode.over_episodes(self._aggregation, parallel_iterations)

    def aggregated(self, values: Tensor) -> Tensor:
        """Values [episodes, ...] of a problem `over_episodes` as [...]."""
        return self._aggregation(values)

    def evaluate(self, inner_batches: InnerBatches, outer_batch: Batch, state: InnerState | None = None,
                 iteration: int | Tensor = 0) -> Evaluation:
        """T inner steps, the outer objective and its predictions in one pass, without derivatives.

        Args:
            inner_batches: T inner batches.
            outer_batch: The batch of the outer objective.
            state: Inner state to start from; default: the initial state Φ_0(λ).
            iteration: The number of the hyper-iteration, which a `stop_tolerance` may follow.

        Returns:
            An `Evaluation`, with `outer_loss`, `inner_losses`, `state` and `predictions`.
        """
        return evaluate(self, inner_batches, outer_batch, state, iteration)

    def predictions(self, state: InnerState, outer_batch: Batch) -> Any:
        """Targets, predictions and sample weights (or None) of the outer batch at the state `state`, for metrics."""
        return predictions_of(self, state, outer_batch)

    def memory_plan(
            self, steps: int, inner_batch: Batch | None = None, memory: float | None = 128 * 2**20) -> MemoryPlan:
        """What `ReverseHG(memory=memory)` stores of an inner training, and why.

        ```python
        print(problem.memory_plan(100, (x[:32], y[:32])))
        ```

        Args:
            steps: Positive int, the steps that are stored at a time: T, or `checkpoint_every`.
            inner_batch: The batch of one inner step, or the `tf.TensorSpec`s of one. Default: one like that of the last
                training.
            memory: Bytes for intermediate results of these steps beside the states, or None for no limit.

        Returns:
            A `MemoryPlan`.

        Raises:
            ValueError: If a number is out of range, or there was no training yet and no batch is given.
        """
        checks.positive_integer("steps", steps)
        if memory is not None:
            checks.non_negative_integer("memory", memory)
        batch = self.last_batch if inner_batch is None else inner_batch
        if batch is None:
            raise ValueError("inner_batch must be given before the first training of a problem. Received: None")
        batch = tf.nest.map_structure(
            lambda leaf: leaf if isinstance(leaf, tf.TensorSpec) else tf.TensorSpec.from_tensor(
                tf.convert_to_tensor(leaf)), batch)
        return memory_plan(self, batch, steps, float("inf") if memory is None else memory)

    def compiled(self, method: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(method, problem, ...)` as a traced function of the rest, one per method: what eager calls run.

        It is traced again when a Python value that the objectives, the model or the method read has changed.

        Args:
            method: A method; functions are kept as long as the problem.
            function: Its class' function, the first two arguments of which are the method and the problem.
        """
        key = id(method), function.__name__
        if key not in self._compiled:
            # The method is kept with its function, so that no other one gets its id.
            self._compiled[key] = method, Retraced(
                lambda *arguments: function(method, self, *arguments),
                [method, self._inner_objective, self._outer_objective, self._features, self.outer_predictions,
                 self.dynamics, self.stop_tolerance, self._check_data, self.model])
        return self._compiled[key][1]

    @property
    def has_data_checks(self) -> bool:
        """Whether there are assertions on data; see `data_checks`."""
        return self._check_data is not None

    def data_checks(self, inner_examples: Any, outer_batch: Batch) -> list[Any]:
        """Assertions on data, a list of tensors or operations; see `check_data`."""
        return [] if self._check_data is None else self._check_data(inner_examples, outer_batch)

    @property
    def outer_objective(self) -> Objective:
        """The outer objective as given."""
        return self._outer_objective


def _checked_variables(name, variables, state=False):
    """The list of Keras variables; of a hyperparameter among outer variables, the variable behind it."""
    if not isinstance(variables, (list, tuple)):
        raise TypeError(f"{name} must be a list. Received: {variables!r} of type {type(variables).__name__}")
    if not variables and not state:
        raise ValueError(f"{name} must not be empty.")
    outer = name in ("outer_variables", "fixed")
    checked, seen = [], set()
    for entry in variables:
        variable = entry.variable if outer and isinstance(entry, OuterVariable) else entry
        if not isinstance(variable, keras.Variable):
            raise TypeError(f"{name} must hold keras.Variables{' or farhox hyperparameters' if outer else ''}. "
                            f"Received: {variable!r} of type {type(variable).__name__}")
        if not state and not keras.backend.is_float_dtype(variable.dtype):
            raise ValueError(f"{name} must be floating-point. Received {variable.path!r} of dtype {variable.dtype}")
        if id(variable) in seen:
            raise ValueError(f"{name} must not name a variable twice. Received twice: {variable.path!r}")
        seen.add(id(variable))
        checked.append(variable)
    return checked
