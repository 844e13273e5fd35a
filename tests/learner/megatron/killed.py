"""fastgrpo whose last rank is killed in the middle of the second step's update. Usage: torchrun … killed.py train"""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from processes import before, signal_at

    from fastgrpo.main import main

    def kill_at_the_second_micro_batch() -> None:
        signal_at("fastgrpo.learner.megatron.head:policy_loss", 2, signal.SIGKILL)

    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        before("fastgrpo.trainer:update_policy", 2, kill_at_the_second_micro_batch)
    main()
