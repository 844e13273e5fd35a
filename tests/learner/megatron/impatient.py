"""fastgrpo that gives a network file system no time. Usage: torchrun … impatient.py train KEY=VALUE ..."""

from fastgrpo import agreement
from fastgrpo.main import main

if __name__ == "__main__":
    agreement.PATIENCE_S = 0.0
    main()
