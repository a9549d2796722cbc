"""What the number of inner steps does to a learned representation, beside the exact solution of the inner problem.

    python scripts/few_shot/effect_of_inner_steps.py --quick
    python scripts/few_shot/effect_of_inner_steps.py

The inner problem is ridge regression on a linear map H of features of 100 Omniglot characters, 3 drawings of each; H is
learned on 3 others and tested on the remaining 14. Its minimiser has a closed form, which is differentiated exactly:
the hypergradients and accuracies of T gradient steps are set beside it. The features are those of a prototypical
network trained on other characters. The last part learns a hyper-representation for few-shot episodes with two bodies
of about equal cost, one residual and one plain convolutional.

Reference: Franceschi et al., Bilevel programming for hyperparameter optimization and meta-learning, 2018, section 5.
"""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program

SETTINGS = ("classes", "inner_steps", "ridge", "inner_learning_rate", "hyper_iterations", "outer_learning_rate",
            "filters", "feature_steps", "body_filters", "residual_filters", "body_steps", "body_episodes")
QUICK = {"classes": 20, "inner_steps": ["1", "16"], "hyper_iterations": 10, "filters": 8, "feature_steps": 20,
         "body_filters": 4, "residual_filters": ["2", "2"], "body_steps": 20, "body_episodes": 20}
SHOTS = 3
EPOCHS = 10


def define_flags():
    experiment_flags.define_flags("results/effect_of_inner_steps")
    flags.DEFINE_integer("classes", 100, "Characters of the ridge regression.", lower_bound=2)
    flags.DEFINE_list("inner_steps", ["1", "4", "16", "64", "256"], "Numbers of inner steps T that learn a map.")
    flags.DEFINE_float("ridge", 0.05, "Strength of the penalty; the largest curvature is 1 in the beginning.",
                       lower_bound=0.0)
    flags.DEFINE_float("inner_learning_rate", 0.5, "Learning rate of gradient descent.", lower_bound=0.0)
    flags.DEFINE_integer("hyper_iterations", 400, f"Updates of the map, a multiple of {EPOCHS}.", lower_bound=EPOCHS)
    flags.DEFINE_float("outer_learning_rate", 2e-3, "Learning rate of Adam for the map.", lower_bound=0.0)
    flags.DEFINE_integer("filters", 32, "Filters of the network of the features, which are four times as many.",
                         lower_bound=1)
    flags.DEFINE_integer("feature_steps", 300, f"Meta-steps of that network, a multiple of {EPOCHS}.",
                         lower_bound=EPOCHS)
    flags.DEFINE_integer("body_filters", 64, "Filters of the plain convolutional body.", lower_bound=1)
    flags.DEFINE_list("residual_filters", ["8", "16", "32"], "Filters of each block of the residual body.")
    flags.DEFINE_integer("body_steps", 200, f"Meta-steps of each body, a multiple of {EPOCHS}; 0 leaves this part out.",
                         lower_bound=0)
    flags.DEFINE_integer("body_episodes", 200, "Episodes of a test of a body, a multiple of 10.", lower_bound=10)


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import numpy as np
import tensorflow as tf

from _shared import experiment, pictures
import farhox
from farhox import meta
from farhox.data.batches import batch_at
from farhox.hypergradients import HyperGradient, HyperGradientResult
from farhox.problem.evaluation import Evaluation

BODIES = ("convolutional", "residual")


@dataclasses.dataclass(frozen=True)
class RidgeHG(HyperGradient):
    """The exact hypergradient where the inner problem is `ridge_problem`'s: through its minimiser in closed form.

    Args:
        ridge: Float, the strength of the penalty.
    """

    ridge: float

    def minimiser(self, mapping, batch):
        x, y = tf.matmul(batch[0], mapping), batch[1]
        count = tf.cast(tf.shape(x)[0], x.dtype)
        curvature = tf.matmul(x, x, transpose_a=True) / count + self.ridge * tf.eye(x.shape[1], dtype=x.dtype)
        return tf.linalg.solve(curvature, tf.matmul(x, y, transpose_a=True) / count)

    def _compute(self, problem, inner_batches, outer_batch, state, carry, iteration):
        (mapping,) = problem.outer_values()
        with tf.GradientTape() as tape:
            tape.watch(mapping)
            evaluation = self._evaluate(problem, mapping, inner_batches, outer_batch)
        gradients = [tape.gradient(evaluation.outer_loss, mapping)]
        return HyperGradientResult(
            gradients, evaluation.outer_loss, evaluation.inner_losses, evaluation.state, [], {})

    def evaluate(self, problem, inner_batches, outer_batch):
        return self._evaluate(problem, problem.outer_values()[0], inner_batches, outer_batch)

    def _evaluate(self, problem, mapping, inner_batches, outer_batch):
        batch = batch_at(inner_batches, 0)
        state = problem.initial_state([mapping])._replace(variables=[self.minimiser(mapping, batch)])
        outer_loss = problem.outer_loss(state, [mapping], outer_batch)
        return Evaluation(outer_loss, problem.step(state, [mapping], batch).loss[None], state)


def ridge_problem(features, classes, ridge, rate):
    """The problem of a linear map [features, features] and a ridge head [features, classes] that starts at zero."""
    mapping = keras.Variable(np.eye(features, dtype="float32"), name="map")
    head = keras.Variable(np.zeros([features, classes], "float32"), name="head")

    def squared_error(batch):
        predictions = keras.ops.matmul(batch[0], keras.ops.matmul(mapping, head))
        return keras.ops.mean(keras.ops.sum((predictions - batch[1]) ** 2, axis=1)) / 2

    return farhox.BilevelProblem(
        lambda batch: squared_error(batch) + ridge / 2 * keras.ops.sum(head ** 2), squared_error,
        inner_variables=[head], outer_variables=[mapping], dynamics=farhox.GradientDescent(rate))


def learn_features(settings, data_dir, seed, folder, file):
    """Trains the network of the features; keeps the features and labels of training, validation and test in `file`."""
    train = meta.load_omniglot(data_dir)[0]
    keras.utils.set_random_seed(seed)
    learner = meta.PrototypicalNetwork(meta.convolutional_body(filters=settings["filters"]), ways=20)
    optimizer = keras.optimizers.Adam(1e-3)
    learner.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    optimizer.build(learner.trainable_variables)
    episodes = meta.ClassificationEpisodes(*train, ways=20, shots=SHOTS, queries=5, seed=seed)
    history = experiment.fit_resumable(learner, episodes.dataset(1), settings["feature_steps"], folder,
                                       steps_per_epoch=settings["feature_steps"] // EPOCHS)
    images, labels = meta.load_omniglot(data_dir, rotations=False)[2]
    ((images, labels),) = meta.split_classes(images, labels, [settings["classes"]], seed)
    features = np.concatenate([learner.embed(part / np.float32(255)) for part in np.array_split(images, 20)])
    draws, parts = np.random.default_rng(seed), ([], [], [])
    for number, label in enumerate(np.unique(labels)):
        own = draws.permutation(np.flatnonzero(labels == label))
        for part, chosen in zip(parts, np.split(own, [SHOTS, 2 * SHOTS])):
            part.append((chosen, np.full(len(chosen), number)))
    chosen = [[np.concatenate(column) for column in zip(*part)] for part in parts]
    training = features[chosen[0][0]]
    features = features - training.mean(axis=0)
    training = training - training.mean(axis=0)
    features /= np.sqrt(np.linalg.eigvalsh(training.T @ training / len(training))[-1])
    with open(file, "wb") as target:
        np.savez(target, **{f"{name}_{kind}": value for name, (places, numbers) in zip(("train", "validation", "test"),
                 chosen) for kind, value in (("x", features[places]), ("y", numbers))})
    return {"accuracy": history["accuracy"][-1], "time_before": history["time_before"]}


def load_features(file, classes):
    """Training, validation and test: pairs of features and one-hot labels."""
    with np.load(file) as stored:
        return [(stored[f"{part}_x"].astype("float32"), np.eye(classes, dtype="float32")[stored[f"{part}_y"]])
                for part in ("train", "validation", "test")]


def compare_hypergradients(settings, parts):
    """Relative distance and cosine of the hypergradient of T steps, T = 1, 2, 4, ..., and the exact one."""
    train, validation, _ = parts
    problem = ridge_problem(train[0].shape[1], settings["classes"], settings["ridge"], settings["inner_learning_rate"])

    def gradient(method, steps):
        return np.ravel(method.compute(problem, farhox.repeat(train, steps), validation).gradients[0])

    exact = gradient(RidgeHG(settings["ridge"]), 1)
    rows = {}
    steps = 1
    while steps <= max(map(int, settings["inner_steps"])):
        found = gradient(farhox.ReverseHG(), steps)
        rows[steps] = {"distance": float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
                       "cosine": float(found @ exact / np.linalg.norm(found) / np.linalg.norm(exact))}
        steps *= 2
    return {"by_steps": rows}


def learn_map(settings, parts, steps, folder):
    """Learns the map through `steps` inner steps, or through the exact solution if None."""
    train, validation, test = parts
    problem = ridge_problem(train[0].shape[1], settings["classes"], settings["ridge"], settings["inner_learning_rate"])
    method = RidgeHG(settings["ridge"]) if steps is None else farhox.ReverseHG()
    batches = farhox.repeat(train, steps or 1)
    optimizer = farhox.HyperOptimizer(problem, method)
    optimizer.compile(keras.optimizers.Adam(settings["outer_learning_rate"]))
    evaluate = tf.function(lambda: method.evaluate(problem, batches, validation) if steps is None else problem.evaluate(
        batches, validation), autograph=False)

    def observe():
        evaluation = evaluate()
        values = {"validation_loss": float(evaluation.outer_loss), "train_loss": float(evaluation.inner_losses[-1])}
        for name, (x, y) in (("validation", validation), ("test", test)):
            predictions = x @ problem.outer_values()[0].numpy() @ evaluation.state.variables[0].numpy()
            values[f"{name}_accuracy"] = float(np.mean(predictions.argmax(1) == y.argmax(1)))
        return values

    start = observe()
    history = experiment.fit_resumable(
        optimizer, tf.data.Dataset.from_tensors((batches, validation)), settings["hyper_iterations"], folder,
        observe=observe, steps_per_epoch=settings["hyper_iterations"] // EPOCHS)
    return {**{name: [value, *history[name]] for name, value in start.items()},
            "time_before": history["time_before"]}


def learn_body(settings, name, data_dir, seed, folder):
    """A hyper-representation with one of the bodies: accuracy on 5-way 1-shot episodes of new characters."""
    train, validation, test = (meta.ClassificationEpisodes(*part, seed=seed) for part in meta.load_omniglot(data_dir))
    keras.utils.set_random_seed(seed)
    body = meta.convolutional_body(filters=settings["body_filters"]) if name == "convolutional" else (
        meta.residual_body(filters=tuple(map(int, settings["residual_filters"])), features=64))
    learner = meta.HyperRepresentation(body, keras.layers.Dense(5, activation="softmax"))
    learner.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, settings["body_steps"])))
    history = experiment.fit_resumable(
        learner, train.dataset(4), settings["body_steps"], folder, steps_per_epoch=settings["body_steps"] // EPOCHS,
        observe=lambda: {"accuracy": learner.evaluate(validation, 40)["accuracy"]}, save_every=60.0)
    return {"parameters": body.count_params(), "validation_accuracy": history["accuracy"],
            "test": learner.evaluate(test, settings["body_episodes"]), "time_before": history["time_before"]}


def run_seed(settings, folder, data_dir, seed):
    features = folder.path / f"features_seed{seed}.npz"
    result = {"features": folder.once(
        f"features_seed{seed}", lambda path: learn_features(settings, data_dir, seed, path, features))}
    parts = load_features(features, settings["classes"])
    result["hypergradients"] = folder.once(
        f"hypergradients_seed{seed}", lambda path: compare_hypergradients(settings, parts))["by_steps"]
    for steps in [*settings["inner_steps"], "exact"]:
        result[steps] = folder.once(f"steps_{steps}_seed{seed}", lambda path: learn_map(
            settings, parts, None if steps == "exact" else int(steps), path))
    for name in BODIES if settings["body_steps"] else ():
        result[name] = folder.once(f"{name}_seed{seed}", lambda path: learn_body(settings, name, data_dir, seed, path))
    return result


def tables(by_seed, settings):
    def cell(values, form="{:.2f}"):
        return experiment.mean_and_range(list(values), form)

    rows = []
    for steps in [*settings["inner_steps"], "exact"]:
        runs = [result[steps] for result in by_seed.values()]
        distance = [result["hypergradients"].get(steps, {}).get("distance", 0.0) for result in by_seed.values()]
        rows.append([steps, cell(distance, "{:.1e}"), *(cell(run[name][-1] for run in runs) for name in (
            "train_loss", "validation_loss")), *(cell((100 * run[name][place] for run in runs), "{:.1f}")
                                                 for name, place in (("validation_accuracy", -1), ("test_accuracy", 0),
                                                                     ("test_accuracy", -1)))])
    text = experiment.markdown_table(
        ["T", "distance of hypergradients", "training loss", "validation loss", "validation accuracy, %",
         "test accuracy before, %", "after, %"], rows)
    if not settings["body_steps"]:
        return text
    rows = [[name, str(next(iter(by_seed.values()))[name]["parameters"]),
             *(cell((100 * result[name]["test"][entry] for result in by_seed.values()), "{:.1f}")
               for entry in ("accuracy", "accuracy_interval")),
             cell((result[name]["seconds"] for result in by_seed.values()), "{:.0f}")] for name in BODIES]
    return text + "\n\n" + experiment.markdown_table(
        ["body", "parameters", "test accuracy, %", "95 % interval, ±", "seconds"], rows)


def plot(by_seed, settings, path):
    """Distance of hypergradients, test accuracy while the map is learned, final losses, the two bodies."""
    with pictures.figure(path, rows=2, columns=2, size=(7.8, 7.0)) as (distance, accuracy, final, body):
        names = [*settings["inner_steps"], "exact"]
        styles, parts = pictures.line_styles(names), pictures.point_styles(["validation", "test"])
        bodies = pictures.line_styles(BODIES)
        for i, result in enumerate(by_seed.values()):
            rows = result["hypergradients"]
            distance.plot(list(map(int, rows)), [row["distance"] for row in rows.values()], "o-",
                          color=pictures.BLUE, markersize=4)
            for name in names:
                values = 100 * np.array(result[name]["test_accuracy"])
                accuracy.plot(np.linspace(0, settings["hyper_iterations"], len(values)), values, **styles[name],
                              label=None if i else name if name == "exact" else f"T = {name}")
            for kind, style in parts.items():
                final.plot(names, [100 * result[name][f"{kind}_accuracy"][-1] for name in names], **style,
                           label=None if i else kind)
            if settings["body_steps"]:
                for name in BODIES:
                    values = 100 * np.array(result[name]["validation_accuracy"])
                    body.plot(settings["body_steps"] / EPOCHS * np.arange(1, EPOCHS + 1), values, **bodies[name],
                              label=None if i else name)
        distance.set(title="Hypergradient of T steps", xlabel="Inner steps T", ylabel="Relative distance to exact one")
        pictures.logarithmic(distance, "x")
        pictures.logarithmic(distance)
        accuracy.set(title="Learning the map", xlabel="Hyper-iteration", ylabel="Test accuracy, %")
        final.set(title="After learning", xlabel="Inner steps T", ylabel="Accuracy, %")
        body.set(title="Bodies of a hyper-representation", xlabel="Meta-step", ylabel="Validation accuracy, %")
        pictures.whole_numbers(accuracy, body)
        pictures.legend_below(accuracy, columns=3)
        pictures.legend_below(final, columns=2)
        if settings["body_steps"]:
            pictures.legend_below(body, columns=2)
        else:
            body.remove()


def main(_):
    program.require(matplotlib="examples")
    settings = experiment_flags.settings(SETTINGS, QUICK)
    lengths = {name: settings[name] for name in ("hyper_iterations", "feature_steps", "body_steps")}
    if any(length % EPOCHS for length in lengths.values()):
        raise SystemExit(f"Numbers of steps must be multiples of {EPOCHS}. Received: {lengths}")
    folder = experiment.Folder(flags.FLAGS.output, settings)
    by_seed = {seed: run_seed(settings, folder, flags.FLAGS.data_dir, seed) for seed in experiment_flags.seeds()}
    output = pathlib.Path(flags.FLAGS.output)
    print(f"\n{len(by_seed)} seed(s): mean (least to greatest)\n{tables(by_seed, settings)}\n"
          f"Results and plot: {output.resolve()}")
    experiment.write_json(output / "results.json", experiment.rounded({"settings": settings, "seeds": by_seed}))
    plot(by_seed, settings, output / "effect_of_inner_steps.png")


if __name__ == "__main__":
    program.run(main)
