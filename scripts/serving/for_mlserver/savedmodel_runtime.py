"""The runtime that lets MLServer answer with exports of farhox: SavedModels with named inputs and any signatures.

`mlserver_settings.py` puts this file beside the settings that name it. Needs neither Keras nor farhox.
"""

import asyncio
import pathlib

import numpy as np
import tensorflow as tf
from mlserver import MLModel, types
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.codecs.numpy import to_datatype
from mlserver.errors import InferenceError
from mlserver.utils import get_model_uri


class SavedModelRuntime(MLModel):
    """Serves the greatest version in the folder `parameters.uri`, or the one that `parameters.version` names.

    A request chooses a signature by its parameter "signature"; without one it is `serving_default`. Refused inputs are
    answered with code 400, of gRPC INVALID_ARGUMENT, and the line of the error that names the input.
    """

    async def load(self):
        folder = pathlib.Path(await get_model_uri(self.settings))
        self.served = self.version or max((path.name for path in folder.iterdir() if path.name.isdigit()), key=int)
        # In a thread, as all that takes time: the server goes on answering, by the version before if there is one.
        self.model = await asyncio.to_thread(tf.saved_model.load, str(folder / self.served))
        return True

    async def predict(self, payload):
        name = getattr(payload.parameters, "signature", "serving_default")
        if name not in self.model.signatures:
            raise InferenceError(f"The signature must be one of {sorted(self.model.signatures)}. Received: {name!r}")
        function = self.model.signatures[name]
        specs, given = function.structured_input_signature[1], sorted(entry.name for entry in payload.inputs)
        if given != sorted(specs):
            raise InferenceError(f"{name!r} takes the inputs {sorted(specs)}. Received: {given}")
        tensors = {entry.name: self._tensor(entry, specs[entry.name].dtype) for entry in payload.inputs}
        try:
            answer = await asyncio.to_thread(function, **tensors)
        except tf.errors.InvalidArgumentError as error:
            # TensorFlow says where in the graph it was before and after the line that says what it was.
            raise InferenceError(error.message.split("\n\t [[")[0].splitlines()[-1]) from error
        return types.InferenceResponse(model_name=self.name, model_version=self.served, outputs=[
            NumpyCodec.encode_output(key, value.numpy()) for key, value in answer.items()])

    def _tensor(self, entry, dtype):
        """An input in the type that the signature takes: of any kind of number that holds no more, as int32 is."""
        datatype = types.Datatype(entry.datatype).value
        text = datatype == "BYTES"
        try:
            array = self.decode(entry, default_codec=StringCodec if text else NumpyCodec)
            array = np.asarray(array, dtype=object if text else None).reshape(entry.shape)
        except (TypeError, ValueError) as error:
            raise InferenceError(f"{entry.name} must hold numbers or strings of its datatype, as many as its shape "
                                 f"says. Received: {error}") from error
        wanted = np.dtype(dtype.as_numpy_dtype)
        if text != (dtype == tf.string) or not np.can_cast(array.dtype, wanted, "same_kind"):
            raise InferenceError(f"{entry.name} must be of datatype {to_datatype(wanted).value} or of numbers that "
                                 f"hold no more. Received: {datatype}")
        return tf.constant(array.astype(wanted))
