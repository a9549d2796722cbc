"""SavedStates: a state appears whole or not at all, a damaged one is named, files of others are left alone."""

import errno
import hashlib
import os
import shutil
import signal

import numpy as np
import pytest
import tensorflow as tf
from file_operations import FileOperations

from farhox.training.saved_states import SavedStates

VALUES = {
    "array": np.arange(6.0).reshape(2, 3), "bfloat": tf.constant([1.0, 0.1], tf.bfloat16), "empty": np.zeros([0, 2]),
    "flag": True, "none": None, "nan": float("nan"), "number": 0.1, "names": ["a", "ü"], "scalar": np.float32(0.1)}
FOREIGN = {"notes.txt": b"mine", "state-1.farhox": b"short", "state-00000009.farhox.bak": b"farhox state 1\n",
           "state-00000001.farhox.part.mine": b"", "checkpoint.weights.h5": b"x"}


def value(number):
    return {**VALUES, "count": number, "large": np.full(1000, number)}


def assert_loaded(loaded, number):
    assert loaded["count"] == number and set(loaded["large"]) == {number}


@pytest.fixture
def two(tmp_path):
    """A folder with two states, and files of others."""
    states = SavedStates(tmp_path / "run")
    states.save(value(1))
    states.save(value(2))
    for name, content in FOREIGN.items():
        (tmp_path / "run" / name).write_bytes(content)
    return tmp_path / "run"


def own(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in FOREIGN)


def assert_others_are_untouched(folder):
    assert {name: (folder / name).read_bytes() for name in FOREIGN} == FOREIGN


def test_what_is_read_is_what_was_written_and_the_last_two_are_kept(two):
    states = SavedStates(two)
    loaded = states.load()
    assert_loaded(loaded, 2)
    assert loaded["array"].dtype == "float64" and loaded["array"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["bfloat"].dtype == tf.bfloat16.as_numpy_dtype and loaded["bfloat"].tolist() == [1.0, 0.10009765625]
    assert loaded["empty"].shape == (0, 2) and loaded["scalar"].dtype == "float32" and np.isnan(loaded["nan"])
    assert (loaded["flag"], loaded["none"], loaded["number"], loaded["names"]) == (True, None, 0.1, ["a", "ü"])
    assert states.save(value(3)) == states.path == two / "state-00000003.farhox"
    assert own(two) == ["state-00000002.farhox", "state-00000003.farhox"]
    assert_others_are_untouched(two)


def killed_at(number, folder):
    """A process saves a state and is killed at the file operation with a number; returns whether it was."""
    process = os.fork()
    if process == 0:
        with FileOperations(number, lambda name: os.kill(os.getpid(), signal.SIGKILL), folder):
            states = SavedStates(folder)
            states.load()
            states.save(value(3))
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def test_a_process_killed_at_any_file_operation_of_a_save_leaves_a_state_that_is_whole(two, tmp_path):
    found, number = [], 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        shutil.copytree(two, folder)
        if not killed_at(number, folder):
            break
        states = SavedStates(folder)
        loaded = states.load()
        assert_loaded(loaded, loaded["count"])
        found.append(loaded["count"])
        # The next process goes on, and leaves nothing of the one that was killed.
        states.save(value(4))
        states.save(value(5))
        assert_loaded(SavedStates(folder).load(), 5)
        assert len(own(folder)) == 2
        assert_others_are_untouched(folder)
    # Before the renaming the old state, after it the new one.
    assert found == sorted(found) and set(found) == {2, 3} and len(found) > 15


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_is_full_is_an_error_that_names_the_path_and_the_last_state_stays(two, tmp_path, code):
    shutil.copytree(two, tmp_path / "count")
    with FileOperations(None, None, tmp_path / "count") as operations:
        SavedStates(tmp_path / "count").save(value(3))
    before = operations.names[:operations.names.index("replace") + 1]

    def fail(name):
        raise OSError(code, os.strerror(code))

    for number in range(1, len(before) + 1):
        states = SavedStates(two)
        states.load()
        with FileOperations(number, fail, two), pytest.raises(OSError, match="not be saved .*state-00000003") as raised:
            states.save(value(3))
        assert raised.value.errno == code
        assert_loaded(SavedStates(two).load(), 2)
        assert own(two) == ["state-00000001.farhox", "state-00000002.farhox"]
    assert_others_are_untouched(two)
    states.save(value(4))
    assert_loaded(SavedStates(two).load(), 4)


def test_a_folder_that_cannot_be_written_to_is_an_error_that_names_the_path(tmp_path):
    def refuse(name):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "state")

    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"could not be saved .*{folder}"):
            SavedStates(folder).check_writable()
    assert (tmp_path / "file").read_text() == "mine"
    with FileOperations(1, refuse, tmp_path), pytest.raises(PermissionError, match="could not be saved"):
        SavedStates(tmp_path / "run").check_writable()
    SavedStates(tmp_path / "run").check_writable()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_damaged_state_is_named_and_the_one_before_it_is_used(two):
    last = two / "state-00000002.farhox"
    whole = last.read_bytes()
    places = (0, 14, 17, 200, len(whole) // 2, len(whole) - 1)
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1:] for i in places]
    for damaged in (b"", whole[:10], whole[:-1], whole + b"x", *flipped):
        last.write_bytes(damaged)
        states = SavedStates(two)
        with pytest.warns(UserWarning, match=f"left out: {last} .*The one before is used: .*state-00000001"):
            assert_loaded(states.load(), 1)
    assert states.save(value(3)) == two / "state-00000003.farhox"
    # One that is whole is not given up for one that is not.
    assert own(two) == ["state-00000001.farhox", "state-00000002.farhox", "state-00000003.farhox"]
    assert last.read_bytes() == damaged
    assert_others_are_untouched(two)


def test_damaged_states_alone_and_those_of_later_versions_are_errors_that_name_the_file(two):
    first, last = (two / f"state-0000000{number}.farhox" for number in (1, 2))
    last.write_bytes(_later(last.read_bytes()))
    with pytest.raises(ValueError, match=f"reads states of version 1. Received: {last} of version 2"):
        SavedStates(two).load()
    for path in (first, last):
        path.write_bytes(b"farhox state 1\n")
    with pytest.raises(ValueError, match=f"damaged states alone: {last} .*{first} .*Move them elsewhere to start anew"):
        SavedStates(two).load()


def _later(data):
    data = data[:-32].replace(b"farhox state 1", b"farhox state 2")
    return data + hashlib.sha256(data).digest()


def test_a_file_of_another_in_the_place_of_a_new_one_is_an_error(two):
    (two / "state-00000003.farhox.part").write_bytes(b"somebody else's")
    with pytest.raises(FileExistsError, match="a file of this name is in the way.*state-00000003.farhox.part"):
        SavedStates(two).save(value(3))
    assert (two / "state-00000003.farhox.part").read_bytes() == b"somebody else's"


@pytest.mark.parametrize("wrong, message", [
    ({"a": [object()]}, r"Received: object in state\['a'\]\[0\]"),
    (np.array(["a", None]), "Received: ndarray in state"),
    ({1: 2}, r"Keys .* must be str. Received: \[1\]")])
def test_what_cannot_be_saved_is_an_error_that_names_the_place(tmp_path, wrong, message):
    with pytest.raises(TypeError, match=message):
        SavedStates(tmp_path).save(wrong)
    assert list(tmp_path.iterdir()) == []


def test_an_address_is_refused():
    with pytest.raises(ValueError, match="Received: 's3://bucket'"):
        SavedStates("s3://bucket")
