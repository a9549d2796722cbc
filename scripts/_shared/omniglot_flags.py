"""The flags of trainings on Omniglot."""

from absl import flags

from _shared import experiment_flags

ALGORITHMS = ("maml", "fomaml", "anil", "imaml", "reptile", "hyper_representation", "joint", "protonet")
SETTINGS = (
    "algorithm", "ways", "shots", "queries", "train_shots", "meta_batch_size", "meta_steps", "steps_per_epoch",
    "inner_steps", "evaluation_steps", "inner_learning_rate", "greatest_inner_learning_rate", "inner_batch_size",
    "outer_learning_rate", "decay", "clipnorm", "learn_learning_rates", "proximal", "damping", "linear_solver_steps",
    "filters", "downsampling", "normalize_features", "transductive", "validation_episodes", "test_episodes")
QUICK = {"meta_steps": 40, "steps_per_epoch": 20, "filters": 8, "validation_episodes": 20, "test_episodes": 40}


def define_flags():
    experiment_flags.define_flags("results/omniglot")
    flags.DEFINE_enum("algorithm", "maml", ALGORITHMS, "Learner.")
    flags.DEFINE_integer("ways", 5, "Classes in an episode.", lower_bound=2)
    flags.DEFINE_integer("shots", 1, "Support examples per class.", lower_bound=1)
    flags.DEFINE_integer("queries", 15, "Query examples per class.", lower_bound=1)
    flags.DEFINE_integer("train_shots", None, "Support examples per class in meta-training. Default: shots.",
                         lower_bound=1)
    flags.DEFINE_integer("meta_batch_size", 4, "Episodes in a meta-step.", lower_bound=1)
    flags.DEFINE_integer("meta_steps", 10000, "Updates of the outer variables; a multiple of steps_per_epoch.",
                         lower_bound=1)
    flags.DEFINE_integer("steps_per_epoch", 200, "Meta-steps between two validations.", lower_bound=1)
    flags.DEFINE_integer("inner_steps", 5, "Inner steps in meta-training.", lower_bound=1)
    flags.DEFINE_integer("evaluation_steps", None, "Inner steps in validation and test. Default: inner_steps.",
                         lower_bound=1)
    flags.DEFINE_float("inner_learning_rate", 0.1, "Learning rate of the inner steps.", lower_bound=0.0)
    flags.DEFINE_float("greatest_inner_learning_rate", None, "Bound of the learned rate (hyper_representation).",
                       lower_bound=0.0)
    flags.DEFINE_integer("inner_batch_size", None, "Support examples in an inner batch (reptile). Default: all.",
                         lower_bound=1)
    flags.DEFINE_float("outer_learning_rate", 1e-3, "Learning rate of Adam, or reptile's step size.", lower_bound=0.0)
    flags.DEFINE_enum("decay", "cosine", ["none", "linear", "cosine"], "How the outer learning rate falls to zero.")
    flags.DEFINE_float("clipnorm", None, "Norm that longer meta-gradients are shortened to.", lower_bound=0.0)
    flags.DEFINE_bool("learn_learning_rates", False, "One learned inner learning rate per weight (maml, fomaml, anil).")
    flags.DEFINE_float("proximal", 2.0, "Strength of the proximal term (imaml).", lower_bound=0.0)
    flags.DEFINE_float("damping", 0.0, "Damping of the linear system (imaml).", lower_bound=0.0)
    flags.DEFINE_integer("linear_solver_steps", 5, "Steps of conjugate gradient (imaml).", lower_bound=1)
    flags.DEFINE_integer("filters", 64, "Filters of each of the four convolutions.", lower_bound=1)
    flags.DEFINE_enum("downsampling", "stride", ["stride", "pool"], "How the convolutions halve the image.")
    flags.DEFINE_bool("normalize_features", False, "Features of length 1.")
    flags.DEFINE_bool("transductive", True, "Batch-norm statistics of the queries in meta-training and validation.")
    flags.DEFINE_integer("validation_episodes", 100, "Episodes of a validation.", lower_bound=1)
    flags.DEFINE_integer("test_episodes", 600, "Episodes of the test.", lower_bound=1)
    flags.DEFINE_float("save_every", 60.0, "Seconds between two saved states.", lower_bound=0.0)
    flags.DEFINE_bool("tensorboard", False, "Write logs for TensorBoard to the folder `tensorboard` of --output.")
