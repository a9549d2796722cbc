"""The maps of a bilevel problem as pure functions of tensors: Φ_0, the inner step, the outer objective."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from farhox._core import autodiff, exact, functional, tree
from farhox._core.inner_state import InnerState, OuterGradients, StepResult, float_leaves, with_float_leaves
from farhox._core.types import Batch, Nest, Objective, Tensor, Tensors, Variables
from farhox.dynamics.base import InnerDynamics
from farhox.outer.outer_variable import OuterVariable, value_of
from farhox.problem.read import check_derivative, warn_of_unnamed


class Maps:
    """What a `BilevelProblem` computes; it says what the objectives, variables and dynamics are.

    The outer variables λ are a list of tensors, the inner state is an `InnerState`, and no variable changes.
    """

    inner_variables: list[keras.Variable]
    outer_variables: list[keras.Variable]
    state_variables: list[keras.Variable]
    dynamics: InnerDynamics
    proximal: Any
    outer_predictions: Any
    stop_gradient: str
    allow_unused: bool
    model: Any
    _trainable: list[keras.Variable]
    _inner_objective: Objective
    _outer_objective: Objective
    _features: Any
    # Ids of the variables that are named as outer or fixed.
    _known: set[int]
    # Of each inner variable, its place among the outer ones or None.
    _learned: list[int | None]

    def raise_if_model_changed(self) -> None:
        """Raises a ValueError that names the variables if others of the model are trainable than at the beginning."""
        if self.model is None:
            return
        current = self.model.trainable_variables
        gone, new = _without(self._trainable, current), _without(current, self._trainable)
        if gone or new:
            raise ValueError(
                f"The model {self.model.name!r} must stay as it was when the problem was made of it: make the problem "
                f"anew. No longer trainable: {variable_names(gone) or 'none'}. Trainable now: "
                f"{variable_names(new) or 'none'}.")

    @property
    def loss_dtype(self) -> tf.DType:
        """Type of inner losses and norms: that of the widest inner variable, at least float32."""
        return tf.float64 if any(variable.dtype == "float64" for variable in self.inner_variables) else tf.float32

    @property
    def has_features(self) -> bool:
        """Whether the inner objective is one of features of the batch."""
        return self._features is not None

    @property
    def constrained_variables(self) -> Variables:
        """The inner variables with a Keras constraint, which holds after each inner step."""
        return [variable for variable in self.inner_variables if variable.constraint is not None]

    def outer_values(self) -> Tensors:
        """The current values of the outer variables λ, a list of tensors."""
        return [tf.convert_to_tensor(variable) for variable in self.outer_variables]

    def initial_state(self, outer: Tensors | None = None) -> InnerState:
        """Φ_0(λ): the inner variables at their stored values, those that are learned at the value in `outer`.

        Args:
            outer: List of tensors aligned with `outer_variables`; default: the current values.

        Returns:
            An `InnerState` at step 0.
        """
        outer = self.outer_values() if outer is None else outer
        variables = self._anchors(outer)
        slots = functional.call(
            self.dynamics.initial_slots, variables, bindings=zip(self.outer_variables, outer)).value
        state_variables = [tf.convert_to_tensor(variable) for variable in self.state_variables]
        return InnerState(variables, state_variables, slots, tf.constant(0, tf.int64))

    def inner_gradients(self, variables: Tensors, state_variables: Tensors, outer: Tensors, batch: Batch,
                        features: Nest = None) -> tuple[Tensor, Tensors, Tensors]:
        """The inner objective and its gradient with respect to the inner variables.

        Traced into a graph, the derivatives of that graph are the exact ones of this map, see `farhox._core.exact`.

        Returns:
            loss: Scalar.
            state_variables: List of tensors, their values after the objective ran.
            gradients: List of tensors aligned with `variables`.

        Raises:
            ValueError: If the objective is not a scalar, assigns a variable that is not a state variable, or does not
                depend on an inner variable; it is named.
        """
        with self._inner_derivatives():
            loss, state_variables, gradients = autodiff.gradients(
                lambda variables: self._inner_loss(variables, state_variables, outer, batch, features), variables)
        missing = [v for v, gradient in zip(self.inner_variables, gradients) if gradient is None]
        if missing and not self.allow_unused:
            raise ValueError("The inner objective must depend on every inner variable. It does not depend on "
                             f"{variable_names(missing)}: take them out of inner_variables, or allow them to be unused "
                             "with allow_unused=True.")
        gradients = [tf.zeros_like(v) if gradient is None else gradient for v, gradient in zip(variables, gradients)]
        return loss, state_variables, gradients

    def inner_loss(self, variables: Tensors, state_variables: Tensors, outer: Tensors, batch: Batch,
                   features: Nest = None) -> Any:
        """The inner objective, proximal term included, and the state variables after it.

        Args:
            features: What `features` returned for the batch, where it was computed before.

        Raises:
            ValueError: If the objective is not a scalar or assigns a variable that is not a state variable.
        """
        with self._inner_derivatives():
            return self._inner_loss(variables, state_variables, outer, batch, features)

    def _inner_loss(self, variables, state_variables, outer, batch, features):
        self.raise_if_model_changed()
        if self.has_features:
            batch = self.features(batch, outer) if features is None else features
        result = functional.call(self._inner_objective, batch, taken_over=self.dynamics.taken_over,
                                 bindings=self._bindings(variables, state_variables, outer))
        warn_of_unnamed(result.read, self._known)
        missed = [variable for variable in self.dynamics.taken_over if id(variable) not in result.met]
        if missed:
            raise ValueError(
                f"{type(self.dynamics).__name__} takes over the l1 part of a regularizer, so the inner objective must "
                f"add the regularizer: sum(model.losses). It does not for {variable_names(missed)}.")
        stray = [variable for variable in result.assigned if not any(variable is v for v in self.state_variables)]
        trained = [variable for variable in stray if any(variable is v for v in self.inner_variables)]
        if trained:
            raise ValueError(
                f"The inner objective must leave inner variables to the dynamics. It assigned {variable_names(trained)}"
                ", which it trains. A layer that replaces its weights in each call, as "
                "keras.layers.SpectralNormalization does in training, has no inner gradient of its own: give the "
                "weights a Keras constraint, which holds after each inner step, or write the layer without the "
                "assignment.")
        if stray:
            raise ValueError(
                "The inner objective may assign state variables only: what it assigns elsewhere is lost from step to "
                f"step. It assigned {variable_names(stray)}. Name these in state_variables (of a Keras model: "
                "state_variables=model.non_trainable_variables).")
        loss = _checked_scalar("inner_objective", result.value)
        if self.proximal is not None:
            strength = self.proximal
            if isinstance(strength, OuterVariable):
                result_of = functional.call(value_of, strength, bindings=zip(self.outer_variables, outer))
                warn_of_unnamed(result_of.read, self._known)
                strength = result_of.value
            distance = tree.subtract(variables, self._anchors(outer))
            loss += tf.cast(0.5 * strength * tree.dot(distance, distance), loss.dtype)
        count = len(self.state_variables)
        return loss, (result.values[len(result.values) - count:] if count else [])

    def _inner_derivatives(self):
        """The rules of further derivatives of the inner objective and its gradient."""
        return exact.exact_derivatives(stops=self.stop_gradient == "exact")

    def features(self, batch: Batch, outer: Tensors) -> Nest:
        """What the inner objective is given of an inner batch, a nest of tensors.

        Raises:
            ValueError: If the features depend on an inner variable.
        """
        statistics = [(variable, tf.convert_to_tensor(variable)) for variable in self.state_variables]
        with self._inner_derivatives():
            result = functional.call(self._features, batch, bindings=[*zip(self.outer_variables, outer), *statistics])
        read = [variable for variable in self.inner_variables if id(variable) in result.read]
        if read:
            raise ValueError("features must not depend on inner variables, which change from step to step. "
                             f"They read {variable_names(read)}.")
        return tf.nest.map_structure(tf.convert_to_tensor, result.value)

    def step(self, state: InnerState, outer: Tensors, batch: Batch, features: Nest = None) -> StepResult:
        """One inner step s_{t+1} = Φ_t(s_t, λ).

        Args:
            state: An `InnerState`.
            outer: List of tensors, λ.
            batch: The inner batch of this step.
            features: The features of the batch, where they were computed before.

        Returns:
            A `StepResult`.

        Raises:
            ValueError: As `inner_gradients`.
        """
        loss, state_variables, gradients = self.inner_gradients(
            state.variables, state.state_variables, outer, batch, features)
        variables, slots = self.updated(gradients, state, outer, batch, features)
        residuals = self._residuals(gradients, state, variables, outer)
        return StepResult(
            state=InnerState(variables, state_variables, slots, state.step + 1),
            loss=tf.cast(loss, self.loss_dtype),
            gradient_norm=tf.cast(tree.norm(residuals), self.loss_dtype),
            gradients=gradients)

    def _residuals(self, gradients, state, variables, outer):
        """What is zero at a minimum of the inner problem: the gradient, unless a penalty or constraint holds there."""
        if not self.dynamics.zero_gradient_is_stationary:
            return functional.call(
                self.dynamics.residuals, gradients, state.variables, variables, state.step,
                bindings=zip(self.outer_variables, outer)).value
        if not self.constrained_variables:
            return gradients
        return functional.call(lambda: [
            gradient if variable.constraint is None else w - tf.convert_to_tensor(variable.constraint(w - gradient))
            for variable, gradient, w in zip(self.inner_variables, gradients, state.variables)],
            bindings=zip(self.outer_variables, outer)).value

    def updated(self, gradients: Tensors, state: InnerState, outer: Tensors, batch: Batch,
                features: Nest = None, dynamics: InnerDynamics | None = None) -> Any:
        """The second half of `step`: the inner variables and slots that the dynamics make of the gradients.

        Args:
            dynamics: Others than those of the problem.
        """
        dynamics = self.dynamics if dynamics is None else dynamics
        if dynamics.first_order:
            gradients = [tf.stop_gradient(gradient) for gradient in gradients]
        objective = []
        if dynamics.needs_objective:
            objective = [
                lambda variables: self.inner_loss(variables, state.state_variables, outer, batch, features)[0]]

        def update():
            with exact.finite_roots():
                variables, slots = dynamics.update(
                    gradients, state.variables, state.slots, state.step, *objective)
                return variables if dynamics.applies_constraints else self._constrained(variables), slots

        result = functional.call(update, bindings=zip(self.outer_variables, outer))
        warn_of_unnamed(result.read, self._known)
        return result.value

    def outer_loss(self, state: InnerState, outer: Tensors, batch: Batch) -> Tensor:
        """The outer objective E(s, λ), a scalar. What it assigns is dropped."""
        return self._outer_loss(state, outer, batch)[0]

    def _outer_loss(self, state, outer, batch):
        result = functional.call(
            self._outer_objective, batch, bindings=self._bindings(state.variables, state.state_variables, outer))
        warn_of_unnamed(result.read, self._known)
        return _checked_scalar("outer_objective", result.value), result.read

    def judged(self, state: InnerState, outer: Tensors, batch: Batch) -> tuple[Tensor, Any]:
        """The outer objective and, where the problem has some, its predictions (else None), in one pass."""
        def both(batch):
            return self._outer_objective(batch), self.outer_predictions and self.outer_predictions(batch)

        loss, predictions = functional.call(
            both, batch, bindings=self._bindings(state.variables, state.state_variables, outer)).value
        return _checked_scalar("outer_objective", loss), predictions

    def outer_gradients(self, state: InnerState, outer: Tensors, batch: Batch) -> OuterGradients:
        """E and its partial derivatives with respect to the state and the outer variables, as `OuterGradients`.

        Raises:
            ValueError: If the outer objective has no derivative.
        """
        leaves = float_leaves(state)

        def objective(inputs):
            at_state = with_float_leaves(state, inputs[:len(leaves)])
            return self._outer_loss(at_state, inputs[len(leaves):], batch)

        loss, read, gradients = autodiff.gradients(objective, leaves + list(outer), exact=True)
        of_state, of_outer = gradients[:len(leaves)], gradients[len(leaves):]
        if all(gradient is None for gradient in of_state):
            inner = [variable for variable in self.inner_variables if id(variable) in read]
            check_derivative(self._outer_objective, of_outer, inner)
        return OuterGradients(loss, of_state, of_outer)

    def predict_outer(self, state: InnerState, outer: Tensors, batch: Batch) -> Any:
        """Targets, predictions and sample weights of the outer batch at the state `state`, for metrics."""
        return functional.call(
            self.outer_predictions, batch,
            bindings=self._bindings(state.variables, state.state_variables, outer)).value

    def _constrained(self, values):
        """The inner variables' constraints, as a Keras optimizer applies them after each step."""
        return [value if variable.constraint is None else tf.convert_to_tensor(variable.constraint(value))
                for variable, value in zip(self.inner_variables, values)]

    def _anchors(self, outer):
        """The initial values w_0, differentiable where they are learned."""
        return [tf.convert_to_tensor(variable) if index is None else tf.identity(outer[index])
                for variable, index in zip(self.inner_variables, self._learned)]

    def _bindings(self, variables, state_variables, outer):
        # Inner variables come after the outer ones: of a variable that is both, the objective sees w_t.
        return (list(zip(self.outer_variables, outer)) + list(zip(self.inner_variables, variables))
                + list(zip(self.state_variables, state_variables)))


def _without(variables, others):
    return [variable for variable in variables if not any(variable is other for other in others)]


def variable_names(variables: Iterable[Any]) -> str:
    """Variables as a person reads them in an error message."""
    return ", ".join(repr(variable.path) for variable in variables)


def _checked_scalar(name, value):
    try:
        value = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must return a scalar tensor. Received: {value!r}") from error
    if not value.dtype.is_floating or value.shape.rank != 0:
        raise ValueError(f"{name} must return a floating-point scalar. Received shape {tuple(value.shape)} and dtype "
                         f"{value.dtype.name}. Reduce the loss over the batch, for example with keras.ops.mean.")
    return value
