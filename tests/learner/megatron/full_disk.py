"""fastgrpo where from the first save on rank 1's disk is full. Usage: torchrun … full_disk.py train KEY=VALUE ..."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from processes import fill_the_disk_at

    from fastgrpo import main

    if os.environ["RANK"] == "1":
        fill_the_disk_at("fastgrpo.checkpoint:Checkpoints.save", 1, 5_000)
    main.SPEAK_AFTER_FIRST_S = 60.0  # torchrun ends this process before, also on a machine that is busy
    main.main()
