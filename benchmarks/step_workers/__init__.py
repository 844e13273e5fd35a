"""What bench_step.py measures with: the case, one worker process a side, and the floor."""
