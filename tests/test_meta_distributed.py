"""Meta-training over replicas and processes: the weights of one device, also after a worker has died."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from few_shot import images, network
from script_files import import_script, script_path
from test_meta_scripts import read_weights

import farhox
from farhox import meta


def maml(model):
    return meta.MAML(model, farhox.Hyperparameter(0.3, low=0.0, name="rate"), 2)


def hyper_representation(model):
    body = keras.Sequential([keras.Input([6, 6, 1]), *model.layers[:-1]])
    return meta.HyperRepresentation(body, keras.layers.Dense(3, activation="softmax"), inner_steps=2)


def reptile(model):
    return meta.Reptile(model, farhox.GradientDescent(0.1), inner_steps=3, batch_size=4)


def compiled(make, strategy=None, metrics=("accuracy",)):
    keras.utils.set_random_seed(0)
    with (strategy or tf.distribute.get_strategy()).scope():
        learner = make(network())
        # Without Adam, which makes steps of rounding errors where a gradient is zero.
        learner.compile(keras.optimizers.SGD(0.1, momentum=0.9), metrics=metrics and list(metrics))
    return learner


def weights_of(learner):
    variables = [*learner.model.variables, *learner.problem.outer_variables, *learner.optimizer.variables]
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def mirrored():
    # Collectives of several strategies in one process, as other tests make them, take each other's places.
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice())


def joint(model):
    return meta.JointTraining(model, 0.1, 1)


@pytest.mark.parametrize("make, loop", [
    pytest.param(joint, "fit", marks=pytest.mark.skipif(farhox.data.datasets.KERAS_IS_OLD, reason="needs Keras 3.9")),
    *(pytest.param(make, loop, marks=pytest.mark.slow) for make, loop in (
        (maml, "fit"), (hyper_representation, "fit_distributed"), (reptile, "fit_distributed")))])
def test_a_meta_batch_over_two_replicas_gives_the_weights_of_one_device(make, loop, tmp_path):
    source, _ = images()
    single, shared = compiled(make, metrics=None), compiled(make, mirrored(), metrics=None)
    start = weights_of(single)
    single.fit(source.dataset(4), steps_per_epoch=3, verbose=0)
    if loop == "fit":
        shared.fit(source.dataset(2), steps_per_epoch=3, verbose=0)  # Each replica takes an element of the data set.
    else:
        meta.fit_distributed(shared, source, meta_batch_size=4, meta_steps=3, folder=tmp_path)
    for expected, actual in zip(weights_of(single), weights_of(shared), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(start, weights_of(single)))


@pytest.mark.slow
def test_a_training_that_is_told_to_stop_saves_its_state_and_goes_on_to_the_same_weights(tmp_path, capsys):
    source, _ = images()
    whole, first, second = (compiled(maml, metrics=None) for _ in range(3))
    losses = meta.fit_distributed(whole, source, 2, 6, tmp_path / "whole")
    assert len(losses) == 6 and np.all(np.isfinite(losses))

    def interrupt(done, loss):
        assert loss == pytest.approx(losses[done - 1], rel=1e-6)
        if done == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as raised:
        meta.fit_distributed(first, source, 2, 6, tmp_path / "parts", report=interrupt)
    assert raised.value.code == 143
    assert (f"Stopped by SIGTERM. The state after 4 meta-steps is saved in {tmp_path / 'parts'}"
            in capsys.readouterr().err)
    # What a process leaves behind that is killed while it writes.
    (tmp_path / "parts" / "state-00000002.farhox.part").write_bytes(b"farhox state")
    reported = []
    again = meta.fit_distributed(second, source, 2, 6, tmp_path / "parts", report=lambda *now: reported.append(now))
    np.testing.assert_allclose(again, losses, rtol=1e-6)
    assert [done for done, _ in reported] == [5, 6]
    for a, b in zip(weights_of(whole), weights_of(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == [
        "state-00000001.farhox", "state-00000002.farhox"]
    assert meta.fit_distributed(compiled(maml, metrics=None), source, 2, 6, tmp_path / "parts") == again


@pytest.mark.slow
def test_a_diverged_training_ends_with_an_error(tmp_path):
    line = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    learner = compiled(lambda _: meta.MAML(line, 1e30, 3, loss="mean_squared_error"), metrics=None)
    with pytest.raises(RuntimeError, match="10 updates in a row were skipped"):
        meta.fit_distributed(learner, meta.SinusoidEpisodes(shots=2, queries=2), 2, 30, tmp_path)


def test_wrong_arguments_are_errors_that_state_the_rule(tmp_path):
    source, episodes = images()
    learner = compiled(maml)
    with pytest.raises(TypeError, match="takes a farhox.meta.Learner and a farhox.meta.EpisodeSource. Received: MAML"):
        meta.fit_distributed(learner, episodes, 2, 6, tmp_path)
    with pytest.raises(ValueError, match="must be compiled, in the scope of its strategy"):
        meta.fit_distributed(maml(network()), source, 2, 6, tmp_path)
    with pytest.raises(ValueError, match="multiple of the number of replicas. Received: meta_batch_size=3 for 2"):
        meta.fit_distributed(compiled(maml, mirrored()), source, 3, 6, tmp_path)


@pytest.mark.parametrize("jobs, task, chief", [
    (["worker"], ("worker", 0), True), (["worker"], ("worker", 1), False), (["chief", "worker"], ("worker", 0), False),
    (["chief", "worker"], ("chief", 0), True), ([], (None, None), True)])
def test_the_chief_is_the_process_that_writes(jobs, task, chief):
    spec = tf.train.ClusterSpec({job: ["127.0.0.1:1", "127.0.0.1:2"] for job in jobs})
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(spec, task_type=task[0], task_id=task[1])
    assert meta.is_chief(type("Strategy", (), {"cluster_resolver": resolver})) == chief
    assert meta.is_chief(tf.distribute.get_strategy())


@pytest.fixture
def launcher(monkeypatch):
    """The script that launches workers, as a module."""
    return import_script("launch_workers", monkeypatch)


WORKER = """
import json, os, pathlib, sys, time
config = json.loads(os.environ["TF_CONFIG"])
index = config["task"]["index"]
file = pathlib.Path(sys.argv[1]) / f"{index}"
starts = file.read_text().count("s") + 1 if file.exists() else 1
file.write_text("s" * starts)
# Worker 1 does not die before the other, which is then stopped, has counted its start.
other = file.with_name("0")
while index == 1 and not (other.exists() and other.read_text().count("s") >= starts):
    time.sleep(0.01)
sys.exit(3 if index == 1 and starts <= int(sys.argv[2]) else len(set(config["cluster"]["worker"])) - 2)
"""


@pytest.mark.slow
def test_workers_have_places_of_their_own_and_are_started_again_when_one_dies(tmp_path, launcher, capfd):
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    launcher.launch([*command, "2"], workers=2, restarts=2)
    assert [(tmp_path / str(index)).read_text() for index in range(2)] == ["sss", "sss"]
    assert "Worker 1 ended with code 3 at start 2 of 3." in capfd.readouterr().err
    with pytest.raises(SystemExit, match="Workers died 2 times; there are no restarts left"):
        launcher.launch([*command, "9"], workers=2, restarts=1)


STOPPED = """
import os, pathlib, signal, sys, time
folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]

def save(number, frame):
    (folder / f"saved{os.getpid()}").write_text("x")
    if kind == "obedient":
        sys.exit(143)

signal.signal(signal.SIGTERM, save)
(folder / f"started{os.getpid()}").write_text("x")
time.sleep(300)
"""


@pytest.mark.parametrize("number, kind", [
    (signal.SIGTERM, "obedient"), (signal.SIGINT, "obedient"), (signal.SIGHUP, "stubborn")])
def test_workers_are_told_to_stop_with_the_launcher_and_none_lives_on(
        tmp_path, launcher, capfd, monkeypatch, number, kind):
    monkeypatch.setattr(launcher, "GRACE", 30.0 if kind == "obedient" else 0.5)

    def tell():
        while len(list(tmp_path.glob("started*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=tell).start()
    start = time.monotonic()
    with pytest.raises(SystemExit) as raised:
        launcher.launch([sys.executable, "-c", STOPPED, str(tmp_path), kind], workers=2, restarts=3)
    assert raised.value.code == 128 + number and time.monotonic() - start < 10.0
    assert len(list(tmp_path.glob("saved*"))) == 2
    for file in tmp_path.glob("started*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.name.removeprefix("started")), 0)
    line, = capfd.readouterr().err.splitlines()
    assert line == f"Stopped by {number.name}, and all workers with it: the same command goes on."
    assert signal.getsignal(number) is before


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory):
    """Keras' folder with random images in the place of Omniglot's."""
    folder = tmp_path_factory.mktemp("keras")
    (folder / "datasets").mkdir()
    drawings = np.random.default_rng(0).integers(0, 256, [1310 * 20, 28, 28, 1], np.uint8)
    np.savez(folder / "datasets" / "farhox_omniglot_28.npz", images=drawings, labels=np.repeat(np.arange(1310), 20))
    return {**os.environ, "KERAS_HOME": str(folder)}


TINY = ["--ways=2", "--queries=2", "--filters=2", "--inner_steps=2", "--meta_batch_size=4", "--meta_steps=40",
        "--steps_per_epoch=40", "--validation_episodes=10", "--test_episodes=10", "--save_every=0"]


def start(script, output, environment, *flags):
    return subprocess.Popen([sys.executable, *(str(script_path(name[:-3])) if name.endswith(".py") else name
                                               for name in script), f"--output={output}", *flags],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output, errors


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one_also_when_one_was_killed(tmp_path, omniglot):
    import psutil

    workers = ["launch_workers.py", "--workers=2", "distributed_omniglot.py"]
    outputs = {"whole": finish(start(workers, tmp_path / "whole", omniglot, *TINY))}
    process = start(workers, tmp_path / "killed", omniglot, *TINY)
    states = tmp_path / "killed" / "states"
    while not list(states.glob("*.farhox")):
        assert process.poll() is None
        time.sleep(0.01)
    psutil.Process(process.pid).children()[1].kill()
    outputs["killed"] = finish(process)
    assert "Worker 1 ended with code -9 at start 1 of 4." in outputs["killed"][1]
    # Told to stop, the launcher ends all within 10 seconds.
    process = start(workers, tmp_path / "told", omniglot, *TINY)
    while not list((tmp_path / "told" / "states").glob("*.farhox")):
        assert process.poll() is None
        time.sleep(0.01)
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and time.monotonic() - told < 10.0
    assert len(re.findall("meta-steps is saved in", errors)) == 1 and errors.count("the same command goes on") == 1
    outputs["told"] = finish(start(workers, tmp_path / "told", omniglot, *TINY))
    digests = {digest for text, _ in outputs.values() for digest in re.findall(r"variables: (\w{64})", text)}
    assert len(digests) == 1 and all(text.count("SHA-256") == 2 for text, _ in outputs.values())

    finish(start(["omniglot.py"], tmp_path / "single", omniglot, *TINY))
    whole, killed, single = (
        read_weights(tmp_path / name / "seed0.weights.h5") for name in ("whole", "killed", "single"))
    assert set(whole) == set(killed) == set(single)
    # The biases before batch normalisation have no effect: Adam makes steps of the rounding errors in their gradients.
    without_effect = {path for path in whole if re.fullmatch(r"layers/.*conv2d(_\d)?/vars/1", path)}
    assert len(without_effect) == 4
    values = {array.tobytes() for path in without_effect for array in (whole[path], single[path])}
    for path, array in whole.items():
        np.testing.assert_array_equal(array, killed[path], err_msg=path)
        if array.tobytes() not in values:
            np.testing.assert_allclose(array, single[path], atol=1e-5, err_msg=path)
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["workers"] == 2 and len(results["losses"]) == 40 and results["test"]["episodes"] == 10
