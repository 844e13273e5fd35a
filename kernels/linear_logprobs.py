"""The public linear_logprobs; today it is its reference."""

from typing import Any

from fastgrpo.kernels import reference


def linear_logprobs(*args: Any, tp_group: Any = None, **kwargs: Any) -> Any:
    """See reference.linear_logprobs."""
    if tp_group is not None:
        raise ValueError(f"tp_group={tp_group!r}: not there yet; use None")
    return reference.linear_logprobs(*args, **kwargs)
