from typing import Any

scale_loss_for_distribution: Any

def __getattr__(name: str) -> Any: ...
