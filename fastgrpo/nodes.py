"""Where in a job of several nodes this process is, as torchrun has put it into the environment."""

from __future__ import annotations

import os
import socket

from fastgrpo.config import UserError


class JobError(UserError):
    """What ends the whole job; the line itself says whose it is."""


def num_nodes() -> int:
    """Nodes of the job, which are torchrun's agents; 1 without torchrun."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def first_of_node() -> bool:
    """Whether this is the process of its node that speaks and writes for it."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def whoami() -> str:
    """This process. Example: "rank 9 on worker-1", or in a job of one node "rank 1"."""
    rank = f"rank {os.environ.get('RANK', '0')}"
    return f"{rank} on {socket.gethostname()}" if num_nodes() > 1 else rank


def has_store() -> bool:
    """Whether there are other nodes, and a store of torchrun's to reach them through before all have met."""
    return num_nodes() > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
