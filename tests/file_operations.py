"""File operations that something happens at: the process is killed, the disk is full."""

import builtins
import os


class FileOperations:
    """Counts what a process does to files in a folder, and calls `happens(name)` at the operation with a number.

    Each write counts twice, before anything and after half of it is written. To be used as a context.

    Args:
        number: Int, from 1 on, or None for none.
        happens: Callable of the operation's name.
        folder: Only files in here count.
    """

    NAMES = ("replace", "rename", "fsync", "unlink", "remove", "open", "mkdir")

    def __init__(self, number, happens, folder):
        self.number, self.happens, self.folder = number, happens, os.fspath(folder)
        self.count, self.names = 0, []
        self._before = {}

    def __enter__(self):
        self._open = builtins.open
        for name in self.NAMES:
            self._before[name] = getattr(os, name)
            setattr(os, name, self._counted(name, self._before[name]))
        builtins.open = self._opened
        return self

    def __exit__(self, *_):
        builtins.open = self._open
        for name, function in self._before.items():
            setattr(os, name, function)

    def reached(self, name):
        self.count += 1
        self.names.append(name)
        if self.count == self.number:
            self.happens(name)

    def _counted(self, name, function):
        def call(target, *args, **kwargs):
            if name == "fsync" or os.fspath(target).startswith(self.folder):
                self.reached(name)
            return function(target, *args, **kwargs)

        return call

    def _opened(self, path, mode="r", *args, **kwargs):
        if isinstance(path, int) or "w" not in mode or not os.fspath(path).startswith(self.folder):
            return self._open(path, mode, *args, **kwargs)
        self.reached("create")
        return _File(self._open(path, mode, *args, **kwargs), self)


class _File:
    def __init__(self, file, operations):
        self._file, self._operations = file, operations

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        data = memoryview(data).cast("B")
        self._operations.reached("write")
        self._file.write(data[:len(data) // 2])
        self._file.flush()
        self._operations.reached("half a write")
        self._file.write(data[len(data) // 2:])
        return len(data)
