"""The public group_advantages; today it is its reference."""

from fastgrpo.kernels.reference import group_advantages, process_advantages

__all__ = ["group_advantages", "process_advantages"]
