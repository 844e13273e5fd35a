"""The Megatron learner, the only room that imports megatron (docs/parallelism.md)."""

import warnings

# What Megatron's own code makes Python and torch say, once a process: nothing that a user could mend.
for _said, _category in (
    (r".*Apex (is|are) not installed", UserWarning),
    (r"full scope is deprecated", UserWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
    (r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated", FutureWarning),
    (r"`load_state_dict` is deprecated", FutureWarning),
):
    warnings.filterwarnings("ignore", _said, _category)
