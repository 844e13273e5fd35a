"""The public linear_policy_loss; today it is its reference."""

from typing import Any

from fastgrpo.kernels import reference


def linear_policy_loss(*args: Any, tp_group: Any = None, **kwargs: Any) -> Any:
    """See reference.linear_policy_loss."""
    if tp_group is not None:
        raise ValueError(f"tp_group={tp_group!r}: not there yet; use None")
    return reference.linear_policy_loss(*args, **kwargs)
