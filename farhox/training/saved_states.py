"""The last states of a training in a folder: each appears whole or not at all, and tells when it is damaged."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_KIND = b"farhox state "
_VERSION = 1
_NAME = re.compile(r"state-(\d{8})\.farhox(\.part)?")
_DIGEST_BYTES = hashlib.sha256().digest_size
_KEPT = 2
_ARRAY = "$array"


class SavedStates:
    """States in a folder, of which the last two are kept.

    A state is written to a file of another name, forced to the disk, and renamed: a process that is killed at any
    moment leaves the states before it as they are. Files that no `SavedStates` wrote are never touched.

    The file: a line `farhox state 1`, the length of the JSON that follows in 8 bytes, the JSON (what is no array, and
    type and shape of each array), the arrays' bytes, and the SHA-256 of all that.

    Args:
        directory: Folder of a file system of this machine; made when the first state is saved.

    Attributes:
        path: Path of the state that was read or written last, or None.

    Raises:
        ValueError: If `directory` is an address.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        if "://" in os.fspath(directory):
            raise ValueError("States are saved in a folder of a file system of this machine, where renaming a file is "
                             f"one step. Received: {os.fspath(directory)!r}")
        self.directory = pathlib.Path(directory)
        self.path: pathlib.Path | None = None
        self._good = []  # Numbers of the states that this object has read or written.

    def load(self) -> Any:
        """The last state that is whole, or None if there is none.

        Damaged ones are named in a warning, and left where they are.

        Raises:
            ValueError: If there are states but none is whole, or one was written by a later version of farhox.
        """
        damaged = []
        for number in sorted(self._numbers(), reverse=True):
            path = self._path(number)
            try:
                value = _read(path)
            except _Damaged as reason:
                damaged.append(f"{path} ({reason})")
                continue
            if damaged:
                warnings.warn(f"Damaged states are left out: {', '.join(damaged)}. The one before is used: {path}",
                              stacklevel=2)
            self._good = sorted({*self._good, number})[-_KEPT:]
            self.path = path
            return value
        if damaged:
            raise ValueError("A run goes on from the last state that is whole. Received damaged states alone: "
                             f"{', '.join(damaged)}. Move them elsewhere to start anew.")
        return None

    def save(self, value: Any) -> Any:
        """Saves a state and returns its path.

        Args:
            value: Nest of dictionaries (keys are str), lists, tuples (read back as lists), numbers, strings, bools,
                None, arrays, tensors and Keras variables (both read back as arrays).

        Raises:
            OSError: If the file cannot be written; the states that are there stay.
            TypeError: If something cannot be saved.
        """
        arrays = []
        content = _encoded(value, arrays, "state")
        number = max(self._numbers(), default=0) + 1
        path = self._path(number)
        with self._naming_the_path(path):
            part = self._new_part(number)
            try:
                _write(part, content, arrays)
                os.replace(part, path)
                _force_folder(self.directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
                raise
        self._good = [*self._good, number][-_KEPT:]
        self._forget_older(number)
        self.path = path
        return path

    def check_writable(self) -> None:
        """Makes the folder and an empty file, which it takes away: an error comes before the work, not after it.

        Raises:
            OSError: If the folder cannot be made or written to.
        """
        number = max(self._numbers(), default=0) + 1
        with self._naming_the_path(self._path(number)):
            part = self._new_part(number)
            part.open("wb").close()
            part.unlink()

    def _path(self, number):
        return self.directory / f"state-{number:08d}.farhox"

    def _numbers(self):
        return [int(name[1]) for name, _ in self._own_names() if not name[2]]

    def _own_names(self):
        if not self.directory.is_dir():
            return []
        return [(name, path) for path in self.directory.iterdir() if (name := _NAME.fullmatch(path.name))]

    def _new_part(self, number):
        """The path of a file to write. One with that name which no process was writing is somebody else's."""
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True, exist_ok=True)
            _force_folder(self.directory.parent)
        part = self.directory / f"state-{number:08d}.farhox.part"
        if part.exists() and not _is_ours(part):
            raise FileExistsError(errno.EEXIST, "a file of this name is in the way", os.fspath(part))
        return part

    def _forget_older(self, number):
        """Takes away what this class wrote and does not need: states before the last two, parts of killed processes."""
        for name, path in self._own_names():
            other = int(name[1])
            needless = other <= number if name[2] else len(self._good) == _KEPT and other < min(self._good)
            if needless and _is_ours(path):
                with contextlib.suppress(OSError):
                    path.unlink()

    @contextlib.contextmanager
    def _naming_the_path(self, path):
        try:
            yield
        except OSError as error:
            raise type(error)(
                error.errno, f"The state of the training could not be saved ({error.strerror or error}); states saved "
                             "before are as they were", error.filename or os.fspath(path)) from error


class _Damaged(Exception):
    pass


def _write(path, content, arrays):
    header = json.dumps({"content": content, "arrays": [[array.dtype.name, array.shape] for array in arrays]}).encode()
    digest: Any = hashlib.sha256()
    with open(path, "wb") as file:
        parts = (_KIND + b"%d\n" % _VERSION, len(header).to_bytes(8, "little"), header)
        for part in (*parts, *(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays)):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())


def _read(path):
    data = path.read_bytes()
    line = data[:len(_KIND) + 20].split(b"\n")[0]
    if not line.startswith(_KIND):
        raise _Damaged("it does not begin as a state does")
    if len(data) < _DIGEST_BYTES or hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
        raise _Damaged("its checksum is another")
    if line != _KIND + b"%d" % _VERSION:
        raise ValueError(f"This version of farhox reads states of version {_VERSION}. Received: {path} of version "
                         f"{line[len(_KIND):].decode()}")
    start = len(line) + 1
    end = start + 8 + int.from_bytes(data[start:start + 8], "little")
    header = json.loads(data[start + 8:end])
    arrays = []
    for name, shape in header["arrays"]:
        dtype = np.dtype(tf.as_dtype(name).as_numpy_dtype)
        size = int(np.prod(shape, dtype="int64")) * dtype.itemsize
        # A copy, so that no array keeps the bytes of the whole file.
        arrays.append(np.frombuffer(data[end:end + size], dtype).reshape(shape).copy())
        end += size
    return _decoded(header["content"], arrays)


def _encoded(value, arrays, where):
    """The value with a number in the place of each array; the arrays go into the list."""
    if isinstance(value, dict):
        if any(not isinstance(key, str) for key in value) or _ARRAY in value:
            raise TypeError(f"Keys of a dictionary in a state must be str. Received: {list(value)} in {where}")
        return {key: _encoded(entry, arrays, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(entry, arrays, f"{where}[{i}]") for i, entry in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (keras.Variable, tf.Variable, tf.Tensor)):
        value = keras.ops.convert_to_numpy(value)
    if not isinstance(value, (np.ndarray, np.generic)) or np.asarray(value).dtype.hasobject:
        raise TypeError("A state is made of dictionaries, lists, numbers, strings, bools, None and arrays. "
                        f"Received: {type(value).__name__} in {where}")
    array = np.asarray(value)
    arrays.append(array.astype(array.dtype.newbyteorder("="), copy=False))
    return {_ARRAY: len(arrays) - 1}


def _decoded(value, arrays):
    if isinstance(value, dict):
        if _ARRAY in value:
            return arrays[value[_ARRAY]]
        return {key: _decoded(entry, arrays) for key, entry in value.items()}
    return [_decoded(entry, arrays) for entry in value] if isinstance(value, list) else value


def _is_ours(path):
    """Whether a file is what this class has written, or was about to write: an empty part."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_KIND))
    except OSError:
        return False
    return start == _KIND or (path.suffix == ".part" and _KIND.startswith(start))


def _force_folder(path):
    """Makes the names in a folder outlast a loss of power, where the system can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
