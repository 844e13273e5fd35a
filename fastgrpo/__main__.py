"""`python -m fastgrpo`, and `torchrun -m fastgrpo`."""

from fastgrpo.main import main

if __name__ == "__main__":
    main()
