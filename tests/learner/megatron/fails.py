"""fastgrpo whose last rank is killed, or raises, in the middle of the second step's update.

Usage: torchrun … fails.py killed|raises train KEY=VALUE ...
"""

import os
import signal
import sys
from pathlib import Path

PLACE = "fastgrpo.learner.megatron.head:policy_loss", 2

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from processes import before, signal_at

    from fastgrpo.main import main

    def fail() -> None:
        raise RuntimeError("this rank has lost its way")

    installs = {"killed": lambda: signal_at(*PLACE, signal.SIGKILL), "raises": lambda: before(*PLACE, fail)}
    install = installs[sys.argv.pop(1)]
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        before("fastgrpo.trainer:update_policy", 2, install)
    main()
