"""A few-shot learner of Omniglot's characters as flags describe it: the network, the learner, the episodes."""

import keras

import farhox
from farhox import meta


def network(settings):
    body = meta.convolutional_body(
        filters=settings["filters"], downsampling=settings["downsampling"],
        normalize_features=settings["normalize_features"])
    if settings["algorithm"] in ("protonet", "hyper_representation"):
        return body
    return meta.few_shot_classifier(settings["ways"], body)


def make_learner(settings, model, transductive):
    """The learner of the settings on a given network."""
    steps = settings["inner_steps"]
    common = {"transductive": transductive, "evaluation_steps": settings["evaluation_steps"] or steps}
    rate = settings["inner_learning_rate"]
    algorithm = settings["algorithm"]
    if algorithm in ("maml", "fomaml", "anil"):
        common.update(inner_learning_rate=rate, inner_steps=steps, first_order=algorithm == "fomaml",
                      learn_learning_rates=settings["learn_learning_rates"])
        return meta.ANIL(model, **common) if algorithm == "anil" else meta.MAML(model, **common)
    if algorithm == "imaml":
        return meta.IMAML(model, rate, steps, settings["proximal"], **common,
                          linear_solver=farhox.ConjugateGradient(max_steps=settings["linear_solver_steps"]),
                          damping=settings["damping"])
    if algorithm == "reptile":
        dynamics = farhox.KerasDynamics(keras.optimizers.Adam(rate, beta_1=0.0))
        return meta.Reptile(model, dynamics, steps, settings["inner_batch_size"], **common)
    if algorithm == "hyper_representation":
        head = keras.layers.Dense(settings["ways"], activation="softmax")
        bound = settings["greatest_inner_learning_rate"]
        rate = farhox.Hyperparameter(rate, low=0.0, high=bound, log=bound is None, name="inner_learning_rate")
        return meta.HyperRepresentation(model, head, rate, steps, **common)
    if algorithm == "joint":
        return meta.JointTraining(model, rate, **common)
    return meta.PrototypicalNetwork(model, settings["ways"])


def compile_learner(learner, settings):
    rate = settings["outer_learning_rate"]
    if settings["decay"] == "linear":
        rate = keras.optimizers.schedules.PolynomialDecay(rate, settings["meta_steps"], 0.0)
    elif settings["decay"] == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, settings["meta_steps"])
    sgd = settings["algorithm"] == "reptile"
    make = keras.optimizers.SGD if sgd else keras.optimizers.Adam
    optimizer = make(rate, global_clipnorm=settings["clipnorm"])
    if isinstance(learner, meta.PrototypicalNetwork):
        learner.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
        optimizer.build(learner.trainable_variables)  # Before a saved state is read.
    else:
        learner.compile(optimizer, metrics=["accuracy"])


def sources(settings, data_dir, seed):
    """Episodes of meta-training, meta-validation and meta-test."""
    shots = settings["shots"]
    made = []
    for part, count in zip(meta.load_omniglot(data_dir), (settings["train_shots"] or shots, shots, shots)):
        queries = min(settings["queries"], 20 - count)  # There are 20 drawings of each character.
        made.append(meta.ClassificationEpisodes(*part, settings["ways"], count, queries, seed=seed))
    return made
