from typing import Any

_graph_mode_decorator: Any
_eager_mode_decorator: Any

def __getattr__(name: str) -> Any: ...
