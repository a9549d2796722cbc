"""Self-tuned hyperparameters in a bilevel problem: its hypergradient is that through the gates."""

import keras
import numpy as np
import pytest

import farhox
from farhox import stn

K = keras.layers


@pytest.mark.slow
def test_a_bilevel_problem_tunes_dropout_through_gates_and_a_strength_of_weights_through_training(float64):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((4,)), K.Dense(5, "tanh"), K.BatchNormalization(), K.Dropout(0.3), K.Dense(3)])
    network = stn.convert(model, strengths=stn.strengths_of(model), gate_initializer="ones")
    draws = stn.TrainingDraws(network)
    rate, = draws.hyperparameters
    decay = farhox.Hyperparameter(0.01, low=0.0, log=True, name="decay")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    seen = []

    def inner(batch):
        def objective(predictions):
            seen.append(rate().shape)
            return loss(batch[1], predictions) + decay() * keras.ops.sum(network.layers[0].kernel ** 2)

        return draws.objective(batch[0], objective)

    def outer(batch):
        return loss(batch[1], network(batch[0], training=False))

    problem = farhox.BilevelProblem(
        inner, outer, network.trainable_variables, [rate, decay], dynamics=farhox.GradientDescent(0.1),
        state_variables=[*network.non_trainable_variables, *draws.state_variables], stop_gradient="tensorflow")
    random = np.random.default_rng(0)
    batch = random.normal(size=(6, 4)), random.integers(0, 3, 6)
    result = farhox.ReverseHG().compute(problem, farhox.repeat(batch, 3), batch)
    assert all(shape == (6,) for shape in seen) and float(np.ptp(result.inner_losses)) > 0
    # Statistics and seeds went on, and nothing outside changed.
    before = [v.numpy() for v in problem.state_variables]
    assert all(not np.array_equal(old, new) for old, new in zip(before, result.state.state_variables))

    gradients = [float(gradient) for gradient in result.gradients]
    values = [*result.state.variables, *result.state.state_variables]
    for variable, value in zip([*problem.inner_variables, *problem.state_variables], values):
        variable.assign(value)
    start = rate.variable.numpy()
    losses = []
    for move in (1e-5, -1e-5):
        rate.variable.assign(start + move)
        losses.append(float(outer(batch)))
    rate.variable.assign(start)
    np.testing.assert_allclose(gradients[0], (losses[0] - losses[1]) / 2e-5, rtol=1e-6)
    assert abs(gradients[0]) > 1e-4 and gradients[1] != 0.0
    # By hand, outside of a problem, the model itself goes on.
    assert draws.objective(batch[0], lambda predictions: loss(batch[1], predictions)).shape == ()
    assert not np.array_equal(draws.state_variables[0], values[-1])


def test_draws_need_a_model_that_responds_and_a_scale():
    plain = keras.Sequential([keras.Input((4,)), K.Dropout(0.3, name="drop"), K.Dense(3)], name="plain")
    with pytest.raises(ValueError, match="needs a model with self-tuning layers.* Received: 'plain' without any"):
        stn.TrainingDraws(plain)
    with pytest.raises(ValueError, match="initial_scale must be a positive finite number"):
        stn.TrainingDraws(stn.convert(plain, strengths=stn.strengths_of(plain)), initial_scale=0.0)
