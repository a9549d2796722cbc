"""Sums of graphs that are run as they are written."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
from tensorflow.python.eager import context


@contextlib.contextmanager
def sums_as_written() -> Iterator[None]:
    """Functions that are called in this thread are run without TensorFlow's rewriting of sums into temporary variables.

    Where a graph is estimated to take more than four fifths of 256 MB, its optimizer adds up three tensors and more in
    a temporary variable, in any order. If one of them is the variable of a loop, the temporary one may be made once
    more when the loop has ended, and the next call fails with an AlreadyExistsError (TensorFlow 2.21).
    """
    eager: Any = context.context()
    before = eager.function_call_options
    eager.function_call_options = _without_rewriting(before.executor_type, before.config_proto_serialized)
    try:
        yield
    finally:
        eager.function_call_options = before


@functools.lru_cache(maxsize=16)
def _without_rewriting(executor_type, config):
    proto = config_pb2.ConfigProto.FromString(config)
    proto.graph_options.rewrite_options.memory_optimization = rewriter_config_pb2.RewriterConfig.NO_MEM_OPT
    return context.FunctionCallOptions(executor_type, proto)
