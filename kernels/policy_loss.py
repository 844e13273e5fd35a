"""The public policy_loss; today it is its reference."""

from fastgrpo.kernels.reference import policy_loss

__all__ = ["policy_loss"]
