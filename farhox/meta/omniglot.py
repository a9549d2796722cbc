"""Omniglot as few-shot learning uses it: 28x28, one channel, ink 1 and paper 0, rotations as classes of their own."""

import hashlib
import os
import pathlib
import warnings
import zipfile
import zlib

import numpy as np
import tensorflow as tf

from farhox.meta.episodes import split_classes, with_rotations

SIZE = 28


def load_omniglot(data_dir: str | os.PathLike | None = None, train: int = 1200, validation: int = 100,
                  seed: int = 0, rotations: bool = True, cache_dir: str | os.PathLike | None = None,
                  download: bool = True) -> list[tuple[np.ndarray, np.ndarray]]:
    """The characters of Omniglot, split by character into meta-training, meta-validation and meta-test.

    All 1,623 characters are pooled, shuffled and split; the rotations of a character stay in its part. Images are read
    with TensorFlow Datasets once and kept as one small file for each folder that they were read from. A file that is
    damaged, or older than the data in the folder, is made anew.

    Args:
        data_dir: Folder of TensorFlow Datasets; default: its own, `~/tensorflow_datasets` or what the environment
            variable TFDS_DATA_DIR names.
        train: Positive int, characters for meta-training.
        validation: Positive int, characters for meta-validation; the rest is for meta-test.
        seed: Int, of the split.
        rotations: Bool. Turn characters of all parts by multiples of 90 degrees to make four times as many classes.
        cache_dir: Folder for the file with the small images. Default: `datasets` in Keras' folder (`~/.keras`, or
            what the environment variable KERAS_HOME names).
        download: Bool. Let TensorFlow Datasets download what is not there.

    Returns:
        Three pairs (images, labels): uint8 [examples, 28, 28, 1] with ink 255 and paper 0, and int [examples].

    Raises:
        ImportError: If the images must be read and tensorflow-datasets is not installed, or does not
            work beside this TensorFlow.
        ValueError: If there are no data in the folder and `download` is false; it is named.

    Reference:
        [Vinyals et al., 2016](https://arxiv.org/abs/1606.04080), section 4.1.1.
    """
    images, labels = _small_images(data_dir, cache_dir, download)
    parts = split_classes(images, labels, [train, validation, None], seed)
    return [with_rotations(*part) for part in parts] if rotations else parts


def _small_images(data_dir, cache_dir, download):
    source = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or pathlib.Path("~", "tensorflow_datasets"))
    source = source.expanduser().resolve()
    home = os.environ.get("KERAS_HOME", os.path.join("~", ".keras"))
    folder = pathlib.Path(cache_dir or os.path.join(home, "datasets")).expanduser()
    file = folder / f"farhox_omniglot_{SIZE}_{hashlib.sha256(str(source).encode()).hexdigest()[:12]}.npz"
    stored = _stored(file, source) if file.exists() else None
    if stored is not None:
        return stored
    images, labels = _read(source, download)
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.stem}.{os.getpid()}.part.npz")
    np.savez_compressed(
        part, images=images, labels=labels, digest=_digest(images, labels), versions=_versions(source))
    os.replace(part, file)  # In one step: another process sees the whole file or none.
    return images, labels


def _stored(file, source):
    """The images and labels of a file, or None if it must be made anew."""
    try:
        with np.load(file) as parts:
            images, labels, digest, versions = (parts[name] for name in ("images", "labels", "digest", "versions"))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        digest = None
    if digest is None or str(digest) != _digest(images, labels):
        warnings.warn(f"The cached images in {file} are damaged: they are read again from {source}.", stacklevel=4)
        return None
    # A folder that is no longer there has nothing newer.
    return (images, labels) if _versions(source) in ("", str(versions)) else None


def _digest(images, labels):
    parts = [f"{array.dtype} {array.shape}".encode() + array.tobytes() for array in (images, labels)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _versions(source):
    """The versions of the data set in a folder of TensorFlow Datasets, as one string."""
    folder = source / "omniglot"
    return " ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) if folder.is_dir() else ""


def _read(data_dir, download):
    try:
        from tensorflow_datasets import load  # Itself: beside an older TensorFlow the module may be empty.
    except ImportError as error:
        raise ImportError("load_omniglot reads the images with the package tensorflow-datasets, which is not "
                          f"installed or does not work ({error}): pip install 'farhox[omniglot]'") from error

    def small(example):
        paper = tf.cast(example["image"][..., :1], tf.float32)
        ink = 255.0 - tf.image.resize(paper, [SIZE, SIZE], method="area")
        return tf.cast(tf.round(ink), tf.uint8), example["label"]

    try:
        dataset = load("omniglot", split="train+test", data_dir=str(data_dir), download=download)
    except AssertionError as error:  # What TensorFlow Datasets raises where there are no data to read.
        raise ValueError("data_dir must hold the data set 'omniglot' as TensorFlow Datasets prepares it; with "
                         f"download=True it is fetched. Received: data_dir={str(data_dir)!r}") from error
    dataset = dataset.map(small, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(512)
    parts = list(dataset.as_numpy_iterator())
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
