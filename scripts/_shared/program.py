"""The frame of every script: how it is run from a command line."""

from absl import app, flags


def run(main, parse=lambda arguments: flags.FLAGS(arguments)):
    """Parses the flags, then calls `main` with the arguments that are left, as absl does."""
    app.run(main, flags_parser=parse)
