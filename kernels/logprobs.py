"""The public logprobs; today it is its reference."""

from fastgrpo.kernels.reference import logprobs

__all__ = ["logprobs"]
