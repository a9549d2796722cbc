"""Self-tuning convolutions: one gate per output channel of every kernel and bias; see `farhox.stn.layers`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from farhox._core.types import Initializer, Shape, Tensor
from farhox.outer.outer_variable import OuterVariable
from farhox.stn.gates import FanInUniform
from farhox.stn.layers import Affine

if TYPE_CHECKING:
    from farhox.stn.self_tuning import Response


class _Channels(Affine):
    """A layer with `data_format`."""

    @property
    def channel_axis(self) -> int:
        return 1 if self.data_format == "channels_first" else -1


class _Convolution(_Channels):
    """What convolutions with one kernel have in common."""

    def __init__(self, filters: int, kernel_size: Shape, hyperparameters: Sequence[OuterVariable],
                 gate_initializer: Initializer | None = None, kernel_initializer: Initializer | None = None,
                 bias_initializer: Initializer | None = None, **kwargs: Any) -> None:
        super().__init__(filters, kernel_size, hyperparameters=hyperparameters, gate_initializer=gate_initializer,
                         kernel_initializer=kernel_initializer or FanInUniform(),
                         bias_initializer=bias_initializer or FanInUniform(), **kwargs)

    def build(self, input_shape: Shape) -> None:
        fan_in = math.prod(self.kernel_size) * input_shape[self.channel_axis] // self.groups
        self.set_fan_in(fan_in, "kernel_initializer", "bias_initializer")
        super().build(input_shape)

    def linear(self, inputs: Tensor, response: Response) -> Tensor:
        padding = self.padding
        if padding == "causal":
            amount = self.dilation_rate[0] * (self.kernel_size[0] - 1)
            time = 2 if self.data_format == "channels_first" else 1
            inputs = tf.pad(inputs, [[amount, 0] if axis == time else [0, 0] for axis in range(3)])
            padding = "valid"
        return response.linear("kernel", lambda kernel: keras.ops.conv(
            inputs, kernel, strides=list(self.strides), padding=padding, dilation_rate=self.dilation_rate,
            data_format=self.data_format), [self.channel_axis])


@keras.saving.register_keras_serializable(package="farhox")
class Conv1D(_Convolution, keras.layers.Conv1D):
    """`keras.layers.Conv1D` with a best response: one gate per output channel.

    Args:
        filters, kernel_size: As in Keras.
        hyperparameters, gate_initializer, centred, reference: See `farhox.stn.layers`.
        **kwargs: As in Keras.
    """

    plain = keras.layers.Conv1D


@keras.saving.register_keras_serializable(package="farhox")
class Conv2D(_Convolution, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with a best response: one gate per output channel.

    Args:
        filters, kernel_size: As in Keras.
        hyperparameters, gate_initializer, centred, reference: See `farhox.stn.layers`.
        **kwargs: As in Keras.
    """

    plain = keras.layers.Conv2D


@keras.saving.register_keras_serializable(package="farhox")
class Conv3D(_Convolution, keras.layers.Conv3D):
    """`keras.layers.Conv3D` with a best response: one gate per output channel.

    Args:
        filters, kernel_size: As in Keras.
        hyperparameters, gate_initializer, centred, reference: See `farhox.stn.layers`.
        **kwargs: As in Keras.
    """

    plain = keras.layers.Conv3D


@keras.saving.register_keras_serializable(package="farhox")
class Conv2DTranspose(_Channels, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` with a best response: one gate per output channel.

    Args:
        filters, kernel_size: As in Keras; initializers too have Keras' defaults.
        hyperparameters, gate_initializer, centred, reference: See `farhox.stn.layers`.
        **kwargs: As in Keras.
    """

    plain = keras.layers.Conv2DTranspose
    gate_axes = {"kernel": (-2,), "bias": (-1,)}

    def __init__(self, filters: int, kernel_size: Shape, hyperparameters: Sequence[OuterVariable],
                 **kwargs: Any) -> None:
        super().__init__(filters, kernel_size, hyperparameters=hyperparameters, **kwargs)

    def linear(self, inputs: Tensor, response: Response) -> Tensor:
        return response.linear("kernel", lambda kernel: keras.ops.conv_transpose(
            inputs, kernel, strides=list(self.strides), padding=self.padding, output_padding=self.output_padding,
            dilation_rate=self.dilation_rate, data_format=self.data_format), [self.channel_axis])


@keras.saving.register_keras_serializable(package="farhox")
class DepthwiseConv2D(_Channels, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with a best response: one gate per output channel.

    Args:
        kernel_size: As in Keras.
        hyperparameters, gate_initializer, centred, reference: See `farhox.stn.layers`.
        **kwargs: As in Keras.
    """

    plain = keras.layers.DepthwiseConv2D
    gate_axes = {"kernel": (-2, -1), "bias": (-1,)}

    def __init__(self, kernel_size: Shape, hyperparameters: Sequence[OuterVariable],
                 gate_initializer: Initializer | None = None, depthwise_initializer: Initializer | None = None,
                 bias_initializer: Initializer | None = None, **kwargs: Any) -> None:
        super().__init__(kernel_size, hyperparameters=hyperparameters, gate_initializer=gate_initializer,
                         depthwise_initializer=depthwise_initializer or FanInUniform(),
                         bias_initializer=bias_initializer or FanInUniform(), **kwargs)

    def build(self, input_shape: Shape) -> None:
        self.set_fan_in(math.prod(self.kernel_size), "depthwise_initializer", "bias_initializer")
        super().build(input_shape)

    def linear(self, inputs: Tensor, response: Response) -> Tensor:
        return response.linear("kernel", lambda kernel: keras.ops.depthwise_conv(
            inputs, kernel, strides=self.strides, padding=self.padding, dilation_rate=self.dilation_rate,
            data_format=self.data_format), [self.channel_axis])


@keras.saving.register_keras_serializable(package="farhox")
class SeparableConv2D(_Channels, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` with a best response: one gate per channel of the depthwise and pointwise outputs.

    Args:
        filters, kernel_size: As in Keras; initializers too have Keras' defaults.
        hyperparameters, gate_initializer, centred, reference: See `farhox.stn.layers`.
        **kwargs: As in Keras.
    """

    plain = keras.layers.SeparableConv2D
    gate_axes = {"depthwise_kernel": (-2, -1), "pointwise_kernel": (-1,), "bias": (-1,)}

    def __init__(self, filters: int, kernel_size: Shape, hyperparameters: Sequence[OuterVariable],
                 **kwargs: Any) -> None:
        super().__init__(filters, kernel_size, hyperparameters=hyperparameters, **kwargs)

    def linear(self, inputs: Tensor, response: Response) -> Tensor:
        depthwise = response.linear("depthwise_kernel", lambda kernel: keras.ops.depthwise_conv(
            inputs, kernel, strides=self.strides, padding=self.padding, dilation_rate=self.dilation_rate,
            data_format=self.data_format), [self.channel_axis])
        return response.linear("pointwise_kernel", lambda kernel: keras.ops.conv(
            depthwise, kernel, strides=1, padding="valid", data_format=self.data_format), [self.channel_axis])
