"""The words of annotations: what functions of this package take and return.

Nests are what `tf.nest` takes: tuples, lists, dictionaries and named tuples of tensors, or one tensor. No type says
what is in them; docstrings do, with shapes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

Tensor: TypeAlias = tf.Tensor
Tensors: TypeAlias = list[tf.Tensor]
Variables: TypeAlias = list[keras.Variable]
Nest: TypeAlias = Any
# A tensor, a NumPy array, or what either can be made of.
Array: TypeAlias = Any
# A nest of tensors with a leading axis of examples; T of them, as `farhox.data` gives them or with a leading axis T.
Batch: TypeAlias = Any
InnerBatches: TypeAlias = Any
# Arrays, a `tf.data.Dataset` or another source of batches.
Data: TypeAlias = Any
# What a method remembers from one hyper-iteration to the next, a nest of tensors.
Carry: TypeAlias = Any

Shape: TypeAlias = Any
DType: TypeAlias = str | tf.DType
Logs: TypeAlias = dict[str, Any]
Config: TypeAlias = dict[str, Any]
Objective: TypeAlias = Callable[[Any], tf.Tensor]
Matvec: TypeAlias = Callable[[tf.Tensor], tf.Tensor]
Loss: TypeAlias = str | keras.losses.Loss | Callable[..., Any]
Optimizer: TypeAlias = str | keras.optimizers.Optimizer
Initializer: TypeAlias = str | keras.initializers.Initializer
Metrics: TypeAlias = list[Any]
Callbacks: TypeAlias = list[keras.callbacks.Callback]
Arrays: TypeAlias = dict[str, np.ndarray]

if TYPE_CHECKING:
    # What classes that stand before a class of Keras, in those that inherit from both, find in themselves.
    InKeras = keras.Layer
else:
    InKeras = object
