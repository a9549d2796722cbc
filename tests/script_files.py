"""The scripts by their names, wherever they are: files that tests run, and modules that tests import."""

import importlib
import pathlib

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "scripts"


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
