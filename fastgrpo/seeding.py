"""Every random number of a run derives from its seed and from what it is for, so nothing depends on execution order."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of the parts alone. Example: derive_seed(run_seed, "rollout", step)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
