# The checker takes what comes from Keras as it is: what it would infer from the source is often only half of the truth.
from typing import Any

def __getattr__(name: str) -> Any: ...
