"""The frame of every script: flags and --help, what is printed and what is not, how it ends.

A script calls `parse` before it imports TensorFlow, so that help and mistakes in flags take no seconds, and `run` when
all is defined.
"""

import contextlib
import os
import re
import signal
import sys
import tempfile
import textwrap

from absl import flags, logging

WIDTH = 80
# What TensorFlow's own code writes: a level and a date, or that its log has not begun.
_LOG_LINE = re.compile(rb"[IWE]\d{4} \d|WARNING: All log messages before absl::InitializeLog")


def parse(define_flags, when_stopped="The same command goes on.", positional=False, tensorflow=True):
    """Reads the flags of the command line, and imports TensorFlow without its log lines.

    With --help prints the description of the script and all its flags, and ends the program.

    Args:
        define_flags: Function that defines the flags of the script. absl's flags are global: they are defined when a
            script runs, not when it is imported.
        when_stopped: Str, what is printed when SIGTERM or Ctrl-C end the program outside of a training.
        positional: Bool, whether the script takes arguments that are no flags.
        tensorflow: Bool, whether the script needs TensorFlow.

    Raises:
        SystemExit: With code 0 after --help, with code 2 and a line that says why for a wrong command line.
    """
    end_in_one_line(when_stopped)
    before = set(flags.FLAGS)
    define_flags()
    own = sorted(set(flags.FLAGS) - before)
    flags.DEFINE_bool("help", False, "Show this help.")
    flags.FLAGS["verbosity"].help = "Least important lines of logs that are shown: -1 warnings, 0 all."
    try:
        others = flags.FLAGS(sys.argv)[1:]
        if others and not positional:
            raise flags.Error(f"All arguments must be flags, which begin with --. Received: {' '.join(others)}")
    except flags.Error as error:
        sys.stderr.write(f"{error}\n--help lists all flags.\n")
        raise SystemExit(2) from None
    if flags.FLAGS.help:
        print(help_text(sys.modules["__main__"].__doc__, [*own, "help", "verbosity"]))
        raise SystemExit(0)
    if tensorflow:
        _import_tensorflow()


def define_names(name, default, choices, text):
    """A flag whose value is a list of names, some of `choices`."""
    flags.DEFINE_list(name, default, f"{text} Some of {', '.join(choices)}.")

    def check(names):
        unknown = [entry for entry in names or () if entry not in choices]
        if unknown:
            raise flags.ValidationError(f"--{name} may name {', '.join(choices)}. Received: {', '.join(unknown)}")
        return True

    flags.register_validator(name, check)


def run(main):
    """Calls `main` with the arguments that are no flags, the script's name first."""
    main(flags.FLAGS(sys.argv))


def help_text(description, names):
    """The description of a script and its flags by name, in lines of 80 characters where that is possible."""
    shown = flags.FlagValues()
    for name in names:
        shown[name] = flags.FLAGS[name]
    return f"{_wrapped(description)}\n\nFlags:\n{shown.get_help(prefix='  ')}"


def _wrapped(text):
    """Paragraphs in lines of 80 characters; those that are indented, as commands are, stay as they are."""
    paragraphs = []
    for paragraph in text.strip().split("\n\n"):
        items = re.split(r"\n(?=- )", paragraph)
        paragraphs.append("\n".join(item if item.startswith(" ") else textwrap.fill(
            " ".join(item.split()), WIDTH, subsequent_indent="  " if item.startswith("- ") else "",
            break_on_hyphens=False) for item in items))
    return "\n\n".join(paragraphs)


def end_in_one_line(line):
    """From now on SIGTERM and Ctrl-C end the program with code 143 or 130, and a line that says how to go on.

    In `fit` they are for `Resume`, which saves the state first.

    Returns:
        Dictionary of the handlers that there were, by number.
    """
    def end(number, frame):
        sys.stderr.write(f"\nStopped by {signal.Signals(number).name}. {line}\n")
        raise SystemExit(128 + number)

    return {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}


@contextlib.contextmanager
def ending_in_one_line(line):
    """`end_in_one_line` for the time of a `with` block."""
    before = end_in_one_line(line)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require(**packages):
    """Fails before the work rather than after it. Keyword arguments: the name of a package, and its extra."""
    for package, extra in packages.items():
        try:
            __import__(package)
        except ImportError as error:
            raise SystemExit(f"This script needs the package {package}, which is not installed: run pip install "
                             f"'.[{extra}]' in the checkout of farhox.") from error


def _import_tensorflow():
    verbose = flags.FLAGS.verbosity >= logging.INFO
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "2")
    with contextlib.nullcontext() if verbose else _without_log_lines():
        import tensorflow as tf
        tf.config.list_physical_devices()  # Looks for GPUs, and tells at length of those that are not there.
    if not verbose:
        tf.get_logger().setLevel("ERROR")  # Where many models are made it warns of as many traces, in long lines.


@contextlib.contextmanager
def _without_log_lines():
    """Lines of TensorFlow's log are left out: those that do not come by way of sys.stderr."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in written:
                if not _LOG_LINE.match(line):
                    os.write(2, line)
