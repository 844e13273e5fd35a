"""Starts job.py. Apart from it, because Megatron's checkpoint writer starts a process that imports what was started."""

if __name__ == "__main__":
    from job import main

    main()
