"""Batch-norm statistics of an episode: from its queries (transductive) or from its support set."""

import contextlib

import keras

from farhox._core import functional


def query_call(model, transductive):
    """The model as it predicts queries: a callable (support x, query x) -> predictions.

    Batch-norm layers normalise queries by the statistics of all queries of the episode together (transductive: a
    prediction depends on the other queries), or by those of the support set (each query stands alone). Their moving
    statistics are never used, so that nothing is carried from one episode to another. Layers such as dropout behave as
    in inference. A model without batch normalisation treats each query on its own in any case.

    Args:
        model: A built `keras.Model`.
        transductive: Bool.

    Returns:
        A callable `(support x, query x) -> predictions`.
    """
    layers = _batch_norms(model)
    own = {id(variable) for layer in layers for variable in layer.non_trainable_variables}
    # Where batch norm alone knows of training, its training mode is what is wanted, in one pass.
    batch_norm_alone = layers and all(id(v) in own for v in model.non_trainable_variables)

    def predict(inputs):
        support, query = inputs
        if not layers:
            return model(query, training=False)
        if transductive and batch_norm_alone:
            return model(query, training=True)
        with _without_memory(layers):
            model(query if transductive else support, training=True)
        return model(query, training=False)

    return predict


def support_statistics(model, inputs, values):
    """The batch-norm statistics of `inputs` under other weights.

    Args:
        model: A built `keras.Model`.
        inputs: Tensor, the support inputs.
        values: Dictionary from ids of the model's variables to tensors.

    Returns:
        Dictionary from ids of the moving statistics to tensors.
    """
    layers = _batch_norms(model)
    if not layers:
        return {}
    statistics = [variable for layer in layers for variable in (layer.moving_mean, layer.moving_variance)]
    bindings = [(variable, values[id(variable)]) for variable in model.variables if id(variable) in values]
    bindings += [(variable, variable.value) for variable in statistics]

    def run():
        with _without_memory(layers):
            model(inputs, training=True)

    result = functional.call(run, bindings=bindings)
    return {id(v): value for v, value in zip(statistics, result.values[len(result.values) - len(statistics):])}


def _batch_norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


@contextlib.contextmanager
def _without_memory(layers):
    """Moving statistics that are assigned inside are those of the batch alone."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
