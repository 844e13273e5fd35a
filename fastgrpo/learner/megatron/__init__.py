"""The Megatron learner, the only room that imports megatron (docs/parallelism.md)."""
