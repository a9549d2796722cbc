"""What every script does on a command line before TensorFlow is imported: help, and mistakes in flags."""

import concurrent.futures
import re
import signal
import subprocess
import sys

import pytest
from absl import flags
from script_files import PROGRAMS, SCRIPTS, given_flags, import_script, script_path


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the scripts answer to --help, in a folder that is not the checkout, with TensorFlow out of reach."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "tensorflow.py").write_text("raise SystemExit('--help has imported TensorFlow.')")

    def ask(name):
        return subprocess.run([sys.executable, str(script_path(name)), "--help"], capture_output=True, text=True,
                              timeout=300, cwd=folder, env={"PYTHONPATH": str(folder), "COLUMNS": "80"})

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(zip(PROGRAMS, pool.map(ask, PROGRAMS)))


def test_there_is_no_script_outside_of_a_theme_and_none_imports_another():
    assert not list(SCRIPTS.glob("*.py")) and len(PROGRAMS) >= 19
    for file in SCRIPTS.glob("*/*.py"):
        imported = re.findall(r"^ *(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.M)
        assert not {*PROGRAMS, *(path.stem for path in (SCRIPTS / "_shared").glob("*.py"))} & set(imported)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_of_a_script_ends_well_and_lists_all_its_flags_in_eighty_columns(name, answers, monkeypatch):
    answer = answers[name]
    assert answer.returncode == 0 and answer.stderr == ""
    before = set(flags.FLAGS)
    script = import_script(name, monkeypatch)
    with given_flags(script.define_flags) as values:
        names = set(values) - before
    listed = set(re.findall(r"^ +(?:-\w,)?--(?:\[no\])?(\w+):", answer.stdout, re.M))
    assert names and names | {"help", "flagfile", "verbosity"} <= listed
    assert max(map(len, answer.stdout.splitlines())) <= 80
    assert f"python {script_path(name).relative_to(SCRIPTS.parent)}" in answer.stdout
    # The sentence of the script's docstring, whatever the lines it stands in.
    assert " ".join(answer.stdout.split()).startswith(" ".join(script.__doc__.split("\n\n")[0].split()))


@pytest.mark.parametrize("name, arguments, rule", [
    ("sinusoid", ["--quik"], "Unknown command line flag 'quik'. Did you mean: quick"),
    ("sinusoid", ["--seed=-1"], "--seed=-1: -1 is not a non-negative integer"),
    ("sinusoid", ["quick"], "All arguments must be flags, which begin with --. Received: quick"),
    ("sinusoid", ["--algorithms=maml,mamm"], "--algorithms may name maml, fomaml, joint. Received: mamm"),
    ("stn_text", ["--baseline=random,bayes"], "--baseline may name grid, random, tpe, fixed. Received: bayes"),
    ("tune_learning_rates", ["--methods=grid"], "--methods may name batch, rtho, .* untuned. Received: grid"),
    ("tune_model", ["--tasks=rnn"], "--tasks may name mlp_sgd, .* digits. Received: rnn"),
    ("benchmark_stn", ["--networks=resnet"], "--networks may name mlp, cnn, alexnet, lstm. Received: resnet"),
    ("benchmark_hypergradients", ["--workloads=W1,W5"], "--workloads may name W1, W2, W3, W4. Received: W5"),
    ("benchmark_hypergradients", ["--methods=reverse,W5"], "--methods may name .* reverse_sqrt. Received: W5")])
def test_a_mistake_in_the_flags_is_one_line_and_code_two(name, arguments, rule, monkeypatch, capsys):
    program = import_script("program", monkeypatch)
    script = import_script(name, monkeypatch)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(program, "end_in_one_line", lambda line: None)
    with given_flags(lambda: None), pytest.raises(SystemExit) as raised:
        program.parse(script.define_flags)
    assert raised.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and re.search(rule, lines[0]) and lines[1] == "--help lists all flags."


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_script_that_is_told_to_stop_ends_with_one_line_from_its_first_moment_on(number, code, monkeypatch, capsys):
    program = import_script("program", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["script"])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with given_flags(lambda: None), pytest.raises(SystemExit) as raised:
            program.parse(lambda: None, when_stopped="The same command starts anew.", tensorflow=False)
            signal.raise_signal(number)
    finally:
        for handled, handler in before.items():
            signal.signal(handled, handler)
    assert raised.value.code == code
    assert capsys.readouterr().err == f"\nStopped by {number.name}. The same command starts anew.\n"
