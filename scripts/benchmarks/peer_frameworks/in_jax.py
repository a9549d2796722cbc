"""The workloads in JAX: ordinary functions, differentiated by `jax.grad` through `lax.scan`, compiled by `jax.jit`.

Ways: `scan`, `checkpoint` (every step recomputed on the way back), `forward` (all directions of `jax.jacfwd` at once),
`linearize` (one primal computation, then the directions); of W3 `loop` (episodes and steps written out) and `map`
(`lax.map` over episodes, `lax.scan` over steps); of W4 `by hand` and `jaxopt`.
"""

import functools

import jax
import jax.numpy as jnp

import case


def made(workload, way, steps, arrays):
    """The hypergradient and the training alone as functions of no arguments."""
    count = sum(name.startswith("outer_variable_") for name in arrays)
    outer = [jnp.asarray(arrays.pop(f"outer_variable_{i}")) for i in range(count)]
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    train, loss = {"W1": softmax_regression, "W2": tanh_network, "W3": few_shot_learner, "W4": near_optimum}[workload](
        way, steps)

    def objective(outer, arrays):
        return loss(train(outer, arrays), arrays)

    def linearized(outer, arrays):
        directions = jax.linearize(lambda vector: objective(list(vector), arrays), jnp.stack(outer))[1]
        return list(jax.vmap(directions)(jnp.eye(count)))

    if way == "by hand":
        hypergradient = functools.partial(implicit_by_hand, train, loss)
    else:
        hypergradient = {"forward": jax.jacfwd(objective), "linearize": linearized}.get(way, jax.grad(objective))
    hypergradient = jax.jit(hypergradient)
    # Of episodes the outer objective is part of it.
    plain = jax.jit(objective if workload == "W3" else train)
    return lambda: hypergradient(outer, arrays), lambda: plain(outer, arrays)


# W1, W2, W4: dense networks. `arrays` has the data x, y, x_outer, y_outer and the weights inner_variable_0, ...


def initial(arrays):
    count = sum(name.startswith("inner_variable_") for name in arrays)
    return [arrays[f"inner_variable_{i}"] for i in range(count)]


def cross_entropies(logits, y):
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]


def losses(weights, x, y):
    for i in range(0, len(weights), 2):
        x = (jnp.tanh(x) if i else x) @ weights[i] + weights[i + 1]
    return cross_entropies(x, y)


def outer_loss(weights, arrays):
    return losses(weights, arrays["x_outer"], arrays["y_outer"]).mean()


def scanned(step, start, inputs, steps, way):
    """The last state of a training."""
    step = jax.checkpoint(step) if way == "checkpoint" else step
    return jax.lax.scan(lambda state, each: (step(state, each), None), start, inputs, length=steps)[0]


def softmax_regression(way, steps):
    def train(outer, arrays):
        rate, example_weights = jnp.exp(outer[0]), jax.nn.sigmoid(outer[1])

        def step(weights, _):
            gradients = jax.grad(lambda w: (example_weights * losses(w, arrays["x"], arrays["y"])).mean())(weights)
            return [w - rate * g for w, g in zip(weights, gradients)]

        return scanned(step, initial(arrays), None, steps, way)

    return train, outer_loss


def tanh_network(way, steps):
    def train(outer, arrays):
        rate, momentum = jnp.exp(outer[0]), jax.nn.sigmoid(outer[1])
        strengths = [jnp.exp(value) for value in outer[2:]]

        def inner_loss(weights, indices):
            penalty = sum(s * jnp.square(w).sum() for s, w in zip(strengths, weights[::2]))
            return losses(weights, arrays["x"][indices], arrays["y"][indices]).mean() + penalty

        def step(state, indices):
            weights, momenta = state
            momenta = [momentum * m + g for m, g in zip(momenta, jax.grad(inner_loss)(weights, indices))]
            return [w - rate * m for w, m in zip(weights, momenta)], momenta

        weights = initial(arrays)
        return scanned(step, (weights, [jnp.zeros_like(w) for w in weights]), arrays["indices"], steps, way)[0]

    return train, outer_loss


# W4: implicit differentiation at a state near the minimum.


def regularized_gradient(weights, outer, arrays):
    """The inner gradient, zero at the minimum."""
    def inner_loss(weights):
        example_losses = jax.nn.sigmoid(outer[1]) * losses(weights, arrays["x"], arrays["y"])
        return example_losses.mean() + jnp.exp(outer[0]) * jnp.square(weights[0]).sum()

    return jax.grad(inner_loss)(weights)


def near_optimum(way, steps):
    def train(weights, outer, arrays):
        def step(weights, _):
            gradients = regularized_gradient(weights, outer, arrays)
            return [w - arrays["learning_rate"] * g for w, g in zip(weights, gradients)]

        return scanned(step, weights, None, steps, way)

    if way == "jaxopt":
        import jaxopt
        solve = functools.partial(jaxopt.linear_solve.solve_cg, maxiter=10, tol=0.0)
        train = jaxopt.implicit_diff.custom_root(regularized_gradient, solve=solve)(train)
    return lambda outer, arrays: train(initial(arrays), outer, arrays), outer_loss


def implicit_by_hand(train, loss, outer, arrays):
    weights = train(outer, arrays)
    product = jax.linearize(lambda weights: regularized_gradient(weights, outer, arrays), weights)[1]
    solution, _ = jax.scipy.sparse.linalg.cg(product, jax.grad(loss)(weights, arrays), tol=0.0, maxiter=10)
    back = jax.vjp(lambda outer: regularized_gradient(weights, outer, arrays), outer)[1]
    return [-gradient for gradient in back(solution)[0]]


# W3: four convolutions with batch normalisation, then a linear layer; the outer variables are the initial weights.


def few_shot_losses(weights, images, labels):
    values = images
    for kernel, bias, scale, offset in zip(*(weights[i:-2:4] for i in range(4))):
        values = jax.lax.conv_general_dilated(
            values, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias
        mean, variance = values.mean([0, 1, 2]), values.var([0, 1, 2])
        values = jax.nn.relu((values - mean) * (scale * jax.lax.rsqrt(variance + 1e-3)) + offset)
    return cross_entropies(values.reshape([len(values), -1]) @ weights[-2] + weights[-1], labels)


def few_shot_learner(way, steps):
    def adapted(weights, x, y, rate):
        def step(weights, _=None):
            gradients = jax.grad(lambda weights: few_shot_losses(weights, x, y).mean())(weights)
            return [w - rate * g for w, g in zip(weights, gradients)]

        if way == "map":
            return scanned(step, weights, None, steps, way)
        for _ in range(steps):
            weights = step(weights)
        return weights

    def train(outer, arrays):
        def one(episode):
            x, y, x_outer, y_outer = episode
            return few_shot_losses(adapted(outer, x, y, arrays["learning_rate"]), x_outer, y_outer).mean()

        episodes = [arrays[name] for name in ("x", "y", "x_outer", "y_outer")]
        if way == "map":
            return jax.lax.map(one, episodes)
        return jnp.stack([one(episode) for episode in zip(*episodes)])

    return train, lambda losses, arrays: losses.mean()


if __name__ == "__main__":
    case.measure(made, jax.block_until_ready, ["jax", "jaxlib", "jaxopt"])
