"""CPU seconds of a computation, and the memory of this process."""

import resource
import time


def timed(function, arguments=()):
    """CPU seconds of one call, its outputs computed to the end."""
    import tensorflow as tf
    start = time.process_time()
    for output in tf.nest.flatten(function(*arguments)):
        output.numpy()
    return time.process_time() - start


def peak_memory():
    """The most resident memory that this process has had, in KB; on Linux, since `forget_peak_memory`."""
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak_memory():
    """Lowers the peak to the memory in use, where Linux allows it: making the data may have taken more."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")
    except OSError:
        pass


def _status(name):
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
