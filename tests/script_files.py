"""The scripts by their names: files that tests run, modules that tests import, and their flags."""

import contextlib
import importlib
import pathlib

from absl import flags

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "scripts"
PROGRAMS = sorted(path.stem for path in SCRIPTS.glob("*/*.py") if path.parent.name != "_shared")


def script_path(name):
    """The file of a script, or of a module that scripts share, by its name without `.py`."""
    (path,) = SCRIPTS.glob(f"*/{name}.py")
    return path


def import_script(name, monkeypatch):
    """A script, or a module that scripts share, as a module; the search path is that of the test alone."""
    folder = script_path(name).parent
    monkeypatch.syspath_prepend(str(SCRIPTS))
    if folder.name == "_shared":
        return importlib.import_module(f"_shared.{name}")
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module(name)


@contextlib.contextmanager
def given_flags(define_flags, *arguments):
    """For the time of a `with` block the flags of a script are defined, and have the values of the arguments."""
    before = set(flags.FLAGS)
    try:
        define_flags()
        flags.FLAGS(["script", *arguments])
        yield flags.FLAGS
    finally:
        flags.FLAGS.unparse_flags()
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
