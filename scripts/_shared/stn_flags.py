"""The flags of experiments with self-tuning networks."""

from absl import flags

from _shared import experiment_flags, program

SEARCHES = {"grid": "Grid search", "random": "Random search", "tpe": "Parzen estimator"}
SETTINGS = ("train_examples", "validation_examples", "steps", "evaluate_every", "batch_size", "learning_rate",
            "hyper_learning_rate", "scale_learning_rate", "entropy_weight", "initial_scale", "warmup_steps",
            "training_steps", "validation_steps", "method", "trials")


def define_flags(output, **defaults):
    """The flags of all these experiments, with the defaults that differ between them."""
    experiment_flags.define_flags(output)
    program.define_names("baseline", defaults["baseline"], [*SEARCHES, "fixed"], "What to compare with.")
    for name, default, what in (
            ("train_examples", None, "Training examples."),
            ("validation_examples", None, "Validation examples, on which hyperparameters are tuned and chosen."),
            ("steps", None, "Gradient steps of a training."),
            ("evaluate_every", None, "Gradient steps between two evaluations."),
            ("batch_size", None, "Examples in a batch."),
            ("trials", 20, "Trainings of a search."),
            ("training_steps", 2, "Self-tuning: training steps in a row."),
            ("validation_steps", 1, "Self-tuning: validation steps after them.")):
        flags.DEFINE_integer(name, defaults.get(name, default), what, lower_bound=1)
    flags.DEFINE_integer("warmup_steps", defaults["warmup_steps"],
                         "Self-tuning: training steps before hyperparameters move.", lower_bound=0)
    for name, default, what in (
            ("learning_rate", None, "Learning rate of the weights, of all trainings."),
            ("hyper_learning_rate", 0.003, "Learning rate of Adam on the unconstrained hyperparameters."),
            ("scale_learning_rate", 0.003, "Learning rate of Adam on the scales of the perturbations; 0: they stay."),
            ("entropy_weight", 1e-3, "Weight of the entropy that keeps perturbations wide."),
            ("initial_scale", 0.5, "Standard deviation of the perturbations to begin with.")):
        flags.DEFINE_float(name, defaults.get(name, default), what, lower_bound=0.0)
    flags.DEFINE_enum("method", "stn", ["stn", "delta"], "Self-tuning networks, or the centred Delta-STN.")
