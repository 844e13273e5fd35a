"""vLLM in the trainer's own processes, on the learner's tensors. The only folder that imports vllm."""

import os
import warnings

# vLLM reads these when it is first imported, so they stand before any module of this folder: it runs in this process,
# binds no threads, reports nothing to anyone, and speaks when something is wrong.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
for _name, _value in (
    ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    ("VLLM_NO_USAGE_STATS", "1"),
    ("VLLM_LOGGING_LEVEL", "ERROR"),
):
    os.environ.setdefault(_name, _value)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its look through its own modules touches deprecated names of torch
    import vllm  # noqa: F401
