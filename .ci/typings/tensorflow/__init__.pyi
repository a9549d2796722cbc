# The checker takes what comes from TensorFlow as it is: the stubs that it brings along know a part of its interface.
from typing import Any

def __getattr__(name: str) -> Any: ...
