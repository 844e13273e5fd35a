"""How a pipeline's stages share the layers: the slowest sets the pace, and the last one computes the head too."""

from __future__ import annotations

from collections.abc import Sequence

from fastgrpo.models.shape import Shape


def stages_of(shape: Shape, num_stages: int, asked: Sequence[int] | None) -> tuple[int, ...]:
    """The layers of each (virtual) stage, in the model's order: as asked for, else balanced."""
    if asked is not None:
        return tuple(asked)
    return balanced_stages(shape.num_layers, shape.head_in_layers, num_stages)


def balanced_stages(num_layers: int, head: float, num_stages: int) -> tuple[int, ...]:
    """The layers of each stage, at least one, so that the slowest takes the least time.

    head: the head's time in layers. Example: 36 layers and a head of 3.2 over 4 stages are (10, 10, 10, 6), where four
    times 9 would take 12.2 a micro-batch instead of 10. Where stages differ the later ones have more: the earlier ones
    hold the activations of more micro-batches.
    """
    if num_stages == 1:
        return (num_layers,)
    others = num_stages - 1

    def slowest(last: int) -> float:
        return max(-(-(num_layers - last) // others), last + head)

    last = min(range(1, num_layers - others + 1), key=lambda last: (slowest(last), -last))
    each, more = divmod(num_layers - last, others)
    return (*(each + (stage >= others - more) for stage in range(others)), last)
