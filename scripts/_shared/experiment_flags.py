"""The flags that all experiments have, and what is made of them."""

import os

from absl import flags


def define_flags(output):
    """The flags of every experiment; `output` is the default of the folder of results."""
    flags.DEFINE_string("data_dir", os.environ.get("FARHOX_DATA_DIR"), "Folder of TFDS' data sets.")
    flags.DEFINE_string("output", output, "Folder for results.json, plots, and runs that can be gone on with.")
    flags.DEFINE_integer("seed", 0, "Seed of data, initial values and batches.", lower_bound=0)
    flags.DEFINE_integer("num_seeds", 1, "Repeats the experiment with this many seeds from --seed on.", lower_bound=1)
    flags.DEFINE_bool("quick", False, "Small sizes for all flags that are not given: shows that everything runs.")


def settings(names, quick):
    """Values of the flags of a script as a dictionary; with --quick those of `quick` where a flag is not given."""
    values = {name: flags.FLAGS[name].value for name in names}
    if flags.FLAGS.quick:
        values.update({name: value for name, value in quick.items() if not flags.FLAGS[name].present})
    return values


def seeds():
    """The seeds to run."""
    return list(range(flags.FLAGS.seed, flags.FLAGS.seed + flags.FLAGS.num_seeds))
