"""Images and texts that the experiments are made on, read with TensorFlow Datasets."""

import collections
import pathlib
import re

import numpy as np

from _shared import program

UNKNOWN, END = "<unk>", "<eos>"


def prepared(name, data_dir):
    """The builder of a data set that is in the folder, or else is downloaded to it; None: TFDS' own folder."""
    program.require(tensorflow_datasets="examples")
    import tensorflow_datasets as tfds
    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
        builder.download_and_prepare()
    return builder


def images(dataset, data_dir, sizes, seed):
    """Parts of the training set of a data set of 28 x 28 images, and its test set.

    Args:
        dataset: "mnist" or "fashion_mnist".
        data_dir: Folder of TFDS' data sets or None, TFDS' own.
        sizes: Number of examples of each part. They are drawn by `seed`; the test set is always the same.
        seed: Int.

    Returns:
        List of (images [n, 28, 28, 1] in [0, 1], labels [n]), the test set last.
    """
    builder = prepared(dataset, data_dir)
    parts = [builder.as_dataset(split=split, batch_size=-1) for split in (f"train[:{sum(sizes)}]", "test")]
    (x, y), test = [
        (part["image"].numpy().astype("float32") / 255, part["label"].numpy().astype("int64")) for part in parts]
    order = np.random.default_rng(seed).permutation(len(x))
    ends = np.cumsum(sizes)[:-1]
    return [*zip(np.split(x[order], ends), np.split(y[order], ends)), test]


def digits(sizes, seed):
    """Parts of the digits of scikit-learn, the rest last, as list of (images [n, 8, 8, 1] in [0, 1], labels [n])."""
    program.require(sklearn="examples")
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    order, ends = np.random.default_rng(seed).permutation(len(x)), np.cumsum(sizes)
    x, y = (x[order] / 16).astype("float32").reshape(-1, 8, 8, 1), y[order].astype("int64")
    return list(zip(np.split(x, ends), np.split(y, ends)))


def small_alphabets(data_dir, count, sizes, seed):
    """Characters of the alphabets of Omniglot that have the fewest, as tasks of one shape.

    Args:
        data_dir: Folder of TFDS' data sets or None, TFDS' own.
        count: Int, the number of alphabets.
        sizes: Examples of each character in each part, 20 in all; who wrote them is drawn by `seed`.
        seed: Int.

    Returns:
        List of (images [alphabets, n, 196] in [0, 1] with ink 1, labels [alphabets, n], 1 where there is an example and
        0 where an alphabet has fewer than the largest, 1 for each character that it has [alphabets, characters]).
    """
    images, alphabet, label, _ = _drawings(data_dir, 14)
    # Characters in the order in which their first drawing is read.
    characters = {task: [np.flatnonzero(label == value) for value in dict.fromkeys(label[alphabet == task])]
                  for task in np.unique(alphabet)}
    chosen = sorted(characters, key=lambda task: (len(characters[task]), task))[:count]
    most = max(len(characters[task]) for task in chosen)
    random = np.random.default_rng(seed)
    parts = [[np.zeros([count, most * size, 196], "float32"), np.zeros([count, most * size], "int64"),
              np.zeros([count, most * size], "float32"), np.zeros([count, most], "float32")] for size in sizes]
    for task, number in enumerate(chosen):
        for character, drawn in enumerate(characters[number]):
            ink = images[drawn]
            order, start = random.permutation(len(ink)), 0
            for part, size in zip(parts, sizes):
                here = slice(character * size, (character + 1) * size)
                part[0][task, here] = ink[order[start:start + size]].reshape(size, -1)
                part[1][task, here], part[2][task, here], part[3][task, character] = character, 1.0, 1.0
                start += size
    return [tuple(part) for part in parts]


def read_texts(level, folder, data_dir):
    """Three lists of tokens: training, validation, test.

    Raises:
        SystemExit: If a file of the folder is missing.
    """
    if folder is not None:
        files = [pathlib.Path(folder) / f"ptb.{part}.txt" for part in ("train", "valid", "test")]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise SystemExit("--folder must have ptb.train.txt, ptb.valid.txt and ptb.test.txt. Missing in "
                             f"{folder}: {', '.join(missing)}")
        return [file.read_text(encoding="utf-8").replace("\n", f" {END} ").split() for file in files]
    builder = prepared("tiny_shakespeare", data_dir)
    texts = [next(iter(builder.as_dataset(split=split)))["text"].numpy().decode()
             for split in ("train", "validation", "test")]
    return [list(text) if level == "characters" else re.findall(r"\w+|[^\w\s]|\n", text) for text in texts]


def encode(texts, size):
    """Texts as integers, by the frequency of tokens in the first text; the last number is for unknown ones.

    Returns:
        List of integer arrays, and the number of tokens.
    """
    known = [token for token, _ in collections.Counter(texts[0]).most_common(size - 1)]
    numbers = {token: i for i, token in enumerate(token for token in known if token != UNKNOWN)}
    return [np.array([numbers.get(token, len(numbers)) for token in text]) for text in texts], len(numbers) + 1


def windows(tokens, window, count):
    """(x, y) of up to `count` windows one after the other, y the token that follows each token of x.

    Raises:
        SystemExit: If there is not one window.
    """
    count = min(count, (len(tokens) - 1) // window)
    if count < 1:
        raise SystemExit(f"A text must have more than --window tokens. Received: {len(tokens)} and {window}")
    return (tokens[:count * window].reshape(count, window), tokens[1:count * window + 1].reshape(count, window))


def alphabets(data_dir, count, size):
    """The alphabets of Omniglot as data sets of their own: drawings of characters, to be told apart.

    Of the twenty drawings of a character twelve are to train on, four to validate, four to test; who drew them is
    drawn once for all.

    Args:
        data_dir: Folder of TFDS' data sets or None, TFDS' own.
        count: Positive int, alphabets, the first by their numbers.
        size: Positive int, pixels of a side; drawings are reduced by means of areas, ink 1 and paper 0.

    Returns:
        List of dictionaries with "name" and "train", "validation", "test": pairs (x [n, size * size], y [n]).
    """
    images, alphabet, label, names = _drawings(data_dir, size, count)
    order, found = np.random.default_rng(0).permutation(20), []
    for number in range(count):
        characters = [np.flatnonzero(label == value) for value in np.unique(label[alphabet == number])]
        entry = {"name": names[number]}
        for part, chosen in (("train", order[:12]), ("validation", order[12:16]), ("test", order[16:])):
            indices = np.concatenate([drawings[chosen] for drawings in characters])
            entry[part] = images[indices].reshape(len(indices), -1), np.repeat(np.arange(len(characters)), len(chosen))
        found.append(entry)
    return found


def _drawings(data_dir, size, count=50):
    """All drawings of the first alphabets, reduced by means of areas, with their alphabets and characters as integers.

    Returns:
        (images [n, size, size, 1] with ink 1 and paper 0, alphabets [n], characters [n], names of alphabets).
    """
    import tensorflow as tf
    builder = prepared("omniglot", data_dir)

    def small(example):
        ink = 255.0 - tf.cast(example["image"][..., :1], tf.float32)
        return tf.image.resize(ink, [size, size], method="area") / 255.0, example["alphabet"], example["label"]

    dataset = builder.as_dataset(split="train+test", shuffle_files=False)
    if count < 50:
        dataset = dataset.filter(lambda example: example["alphabet"] < count)
    parts = list(dataset.map(small, num_parallel_calls=2).batch(512).as_numpy_iterator())
    return (*(np.concatenate(arrays) for arrays in zip(*parts)), builder.info.features["alphabet"].names)
