"""The workloads in PyTorch, eagerly: modules, and what differentiates through their training.

Ways: `by hand` (`torch.autograd.grad` with `create_graph`, modules called by `torch.func.functional_call`), `TorchOpt`
(its `MetaSGD`; of W4 its `custom_root`) and `higher` (its `innerloop_ctx`). Plain training is that by hand.

Convolutions of stride 2 with TensorFlow's "SAME" padding pad the right of an even image; those of PyTorch pad the left.
Images and kernels are mirrored before and gradients after what is measured: the numbers are the same then.
"""

import functools

import numpy as np
import torch
from torch.nn import functional

import case


def made(workload, way, steps, arrays):
    """The hypergradient and the training alone as functions of no arguments."""
    torch.manual_seed(0)
    return {"W1": softmax_regression, "W2": tanh_network, "W3": few_shot_learner, "W4": near_optimum}[workload](
        way, steps, arrays)


def tensors_of(arrays, prefix):
    count = sum(name.startswith(prefix) for name in arrays)
    return [torch.from_numpy(arrays[f"{prefix}{i}"]) for i in range(count)]


def numbers_of(gradients):
    return [gradient.detach().numpy() for gradient in gradients]


# The inner training in three ways.


def loss_after_training(way, model, settings, inner_loss, steps, outer_loss, differentiable=True):
    """The outer loss after the inner steps; differentiable in settings and initial weights.

    Args:
        way: "by hand", "TorchOpt" or "higher".
        model: A module whose parameters are the initial weights; it has them again afterwards.
        settings: Dictionary, `lr` and maybe `momentum`: floats or scalar tensors.
        inner_loss: Callable `model, parameters, step -> scalar`.
        steps: Int.
        outer_loss: Callable `model -> scalar`.
        differentiable: Bool; False for plain training by hand.
    """
    return {"by hand": _by_hand, "TorchOpt": _by_torchopt, "higher": _by_higher}[way](
        model, settings, inner_loss, steps, outer_loss, differentiable)


def _by_hand(model, settings, inner_loss, steps, outer_loss, differentiable):
    names = [name for name, _ in model.named_parameters()]
    weights, momenta = list(model.parameters()), [0.0] * len(names)

    def called(weights):
        return lambda *inputs: torch.func.functional_call(model, dict(zip(names, weights)), inputs)

    for t in range(steps):
        gradients = torch.autograd.grad(inner_loss(called(weights), weights, t), weights, create_graph=differentiable)
        with torch.set_grad_enabled(differentiable):
            if "momentum" in settings:
                gradients = momenta = [settings["momentum"] * m + g for m, g in zip(momenta, gradients)]
            weights = [w - settings["lr"] * g for w, g in zip(weights, gradients)]
        if not differentiable:
            weights = [w.requires_grad_() for w in weights]
    return outer_loss(called(weights))


def _by_torchopt(model, settings, inner_loss, steps, outer_loss, differentiable):
    import torchopt
    start = torchopt.extract_state_dict(model)
    optimizer = torchopt.MetaSGD(model, **settings)
    for t in range(steps):
        optimizer.step(inner_loss(model, list(model.parameters()), t))
    loss = outer_loss(model)
    torchopt.recover_state_dict(model, start)
    return loss


def _by_higher(model, settings, inner_loss, steps, outer_loss, differentiable):
    import higher
    # The settings of the optimizer are overridden by the outer variables.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if "momentum" in settings else 0.0)
    override = {name: [value] for name, value in settings.items()}
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, override=override) as (network, training):
        for t in range(steps):
            training.step(inner_loss(network, list(network.parameters()), t))
        return outer_loss(network)


# W1, W2, W4: dense networks.


def network(weights):
    """Linear layers with tanh between them; of TensorFlow's kernels and biases."""
    layers = []
    for kernel, bias in zip(weights[::2], weights[1::2]):
        layer = torch.nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(kernel.T)
            layer.bias.copy_(bias)
        layers += [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def leaves(arrays):
    return [value.requires_grad_() for value in tensors_of(arrays, "outer_variable_")]


def data_of(arrays, *names):
    return [torch.from_numpy(arrays[name]) for name in names]


def softmax_regression(way, steps, arrays):
    outer = leaves(arrays)
    x, y, x_outer, y_outer = data_of(arrays, "x", "y", "x_outer", "y_outer")
    model = network(tensors_of(arrays, "inner_variable_"))

    def loss(way, differentiable=True):
        rate, weights = outer[0].exp(), outer[1].sigmoid()

        def inner_loss(model, parameters, t):
            return (weights * functional.cross_entropy(model(x), y, reduction="none")).mean()

        return loss_after_training(way, model, {"lr": rate}, inner_loss, steps,
                                   lambda model: functional.cross_entropy(model(x_outer), y_outer), differentiable)

    return lambda: torch.autograd.grad(loss(way), outer), lambda: loss("by hand", differentiable=False)


def tanh_network(way, steps, arrays):
    outer = leaves(arrays)
    x, y, x_outer, y_outer, indices = data_of(arrays, "x", "y", "x_outer", "y_outer", "indices")
    model = network(tensors_of(arrays, "inner_variable_"))

    def loss(way, differentiable=True):
        rate, momentum = outer[0].exp(), outer[1].sigmoid()
        strengths = [value.exp() for value in outer[2:]]

        def inner_loss(model, parameters, t):
            penalty = sum(s * kernel.square().sum() for s, kernel in zip(strengths, parameters[::2]))
            return functional.cross_entropy(model(x[indices[t]]), y[indices[t]]) + penalty

        return loss_after_training(way, model, {"lr": rate, "momentum": momentum}, inner_loss, steps,
                                   lambda model: functional.cross_entropy(model(x_outer), y_outer), differentiable)

    return lambda: torch.autograd.grad(loss(way), outer), lambda: loss("by hand", differentiable=False)


def near_optimum(way, steps, arrays):
    outer = leaves(arrays)
    x, y, x_outer, y_outer = data_of(arrays, "x", "y", "x_outer", "y_outer")
    start, rate = tensors_of(arrays, "inner_variable_"), float(arrays["learning_rate"])

    def inner_loss(kernel, bias, strength, weights):
        example_losses = functional.cross_entropy(x @ kernel + bias, y, reduction="none")
        return (weights.sigmoid() * example_losses).mean() + strength.exp() * kernel.square().sum()

    def outer_loss(kernel, bias):
        return functional.cross_entropy(x_outer @ kernel + bias, y_outer)

    @torch.enable_grad()  # TorchOpt calls it where gradients are off.
    def train(start, outer):
        weights = [w.detach().requires_grad_() for w in start]
        for _ in range(steps):
            gradients = torch.autograd.grad(inner_loss(*weights, *outer), weights)
            weights = [(w - rate * g).detach().requires_grad_() for w, g in zip(weights, gradients)]
        return weights

    def by_hand():
        weights = train(start, [value.detach() for value in outer])
        gradients = torch.autograd.grad(inner_loss(*weights, *outer), weights, create_graph=True)
        solution = conjugate_gradients(
            lambda v: torch.autograd.grad(gradients, weights, v, retain_graph=True),
            torch.autograd.grad(outer_loss(*weights), weights), 10)
        return [-gradient for gradient in torch.autograd.grad(gradients, outer, solution)]

    def by_torchopt():
        import torchopt
        gradient = torch.func.grad(inner_loss, argnums=(0, 1))

        @torchopt.diff.implicit.custom_root(
            lambda weights, strength, weights_of_examples: gradient(*weights, strength, weights_of_examples),
            argnums=(1, 2), solve=torchopt.linear_solve.solve_cg(maxiter=10, rtol=0.0, atol=0.0))
        def solved(start, strength, weights_of_examples):
            return tuple(train(start, [strength.detach(), weights_of_examples.detach()]))

        return torch.autograd.grad(outer_loss(*solved(tuple(start), *outer)), outer)

    plain_outer = [value.detach() for value in outer]
    return {"by hand": by_hand, "TorchOpt": by_torchopt}[way], lambda: train(start, plain_outer)


def conjugate_gradients(product, right, steps):
    """`steps` steps from zero."""
    def dot(a, b):
        return sum((one * other).sum() for one, other in zip(a, b))

    solution, residual, direction = [torch.zeros_like(r) for r in right], list(right), list(right)
    length = dot(residual, residual)
    for _ in range(steps):
        image = product(direction)
        size = length / dot(direction, image)
        solution = [s + size * d for s, d in zip(solution, direction)]
        residual = [r - size * i for r, i in zip(residual, image)]
        before, length = length, dot(residual, residual)
        direction = [r + length / before * d for r, d in zip(residual, direction)]
    return solution


# W3: four convolutions with batch normalisation, then a linear layer; the outer variables are the initial weights.


class Layout:
    """Weights of TensorFlow as those of `convolutional`, and gradients back: mirrored, channels first."""

    def __init__(self, weights):
        self.places = int(round((weights[-2].shape[0] / weights[-3].shape[0]) ** 0.5))

    def to_torch(self, weights):
        def kernel(w):
            return np.transpose(w[::-1, ::-1], (3, 2, 0, 1))

        head = weights[-2].reshape(self.places, self.places, -1, weights[-2].shape[1])
        head = np.transpose(head[::-1, ::-1], (3, 2, 0, 1)).reshape(weights[-2].shape[1], -1)
        return [*(kernel(w) if w.ndim == 4 else w for w in weights[:-2]), head, weights[-1]]

    def from_torch(self, weights):
        def kernel(w):
            return np.transpose(w, (2, 3, 1, 0))[::-1, ::-1]

        head = kernel(weights[-2].reshape(len(weights[-2]), -1, self.places, self.places))
        return [*(kernel(w) if w.ndim == 4 else w for w in weights[:-2]), head.reshape(-1, len(weights[-2])),
                weights[-1]]


def convolutional(weights):
    layers = []
    for kernel in weights[:-2:4]:
        filters, channels = kernel.shape[:2]
        layers += [torch.nn.Conv2d(channels, filters, 3, stride=2, padding=1),
                   torch.nn.BatchNorm2d(filters, eps=1e-3, track_running_stats=False), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(*weights[-2].shape[::-1]))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights):
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
    return model


def few_shot_learner(way, steps, arrays):
    count = sum(name.startswith("outer_variable_") for name in arrays)
    weights = [arrays[f"outer_variable_{i}"] for i in range(count)]
    layout = Layout(weights)
    model = convolutional(layout.to_torch(weights))
    x, x_outer = (torch.from_numpy(np.ascontiguousarray(np.moveaxis(arrays[name], -1, 2)[..., ::-1, ::-1]))
                  for name in ("x", "x_outer"))
    y, y_outer = data_of(arrays, "y", "y_outer")
    settings = {"lr": float(arrays["learning_rate"])}

    def losses(way, differentiable=True):
        return [loss_after_training(
            way, model, settings, lambda model, parameters, t: functional.cross_entropy(model(x[i]), y[i]), steps,
            lambda model: functional.cross_entropy(model(x_outer[i]), y_outer[i]), differentiable)
            for i in range(len(x))]

    def hypergradient():
        gradients = torch.autograd.grad(torch.stack(losses(way)).mean(), list(model.parameters()))
        return lambda: layout.from_torch(numbers_of(gradients))

    return hypergradient, functools.partial(losses, "by hand", differentiable=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    case.measure(made, lambda computed: computed, ["torch", "torchopt", "higher"])
