"""What a step does, in numbers: the first lines of a run and of a plan."""

from __future__ import annotations

from typing import Any

from fastgrpo.config import Config
from fastgrpo.data import PromptSets
from fastgrpo.models.shape import Shape
from fastgrpo.models.stages import stages_of


def batch_algebra(
    config: Config, prompts: PromptSets, num_ranks: int, model: str, model_config: Any
) -> list[tuple[str, str]]:
    """What a step does, in numbers; `model` is its description."""
    train, group_size = config.train, config.algorithm.group_size
    sequences = train.prompts_per_step * group_size
    longest = max(len(p.token_ids) for p in prompts.train) + config.sampling.max_new_tokens
    several = "s" if train.updates_per_step > 1 else ""
    updates = f"{train.updates_per_step} update{several} of {sequences // train.num_minibatches}"
    has_environment = config.environment.path is not None
    turns = f" in up to {config.environment.max_turns} turns" if has_environment else ""
    dropped = f", {prompts.num_dropped} too long and dropped" if prompts.num_dropped else ""
    duplicates = f", {prompts.num_duplicates} repeat a held-out one and are left out" if prompts.num_duplicates else ""
    files = f" of {prompts.num_files} files" if prompts.num_files > 1 else ""
    lines = [
        ("model", model),
        ("data", f"{len(prompts.train)} prompts{files} to train on, {len(prompts.eval)} held out{dropped}{duplicates}"),
        ("a step", f"{train.prompts_per_step} prompts x {group_size} completions = {sequences} sequences"),
        ("", f"of up to {longest} tokens{turns}, {updates}"),
        ("micro-batch", f"up to {config.learner.max_tokens_per_microbatch} packed tokens"),
        ("run", f"{train.num_steps} steps, written to {config.run.dir}"),
    ]
    if num_ranks > 1:
        learner = config.learner
        copies = num_ranks // learner.ranks_a_copy
        cut = f"tp={learner.tp} x pp={learner.pp}" + (f" x cp={learner.cp}" if learner.cp > 1 else "")
        cut += f" x {copies} data parallel" + (f", experts over ep={learner.ep}" if learner.ep > 1 else "")
        lines.insert(1, ("ranks", f"{num_ranks} = {cut}; {sequences / copies:g} sequences each"))
        if learner.pp > 1:
            stages = stages_of(Shape.of(model_config), learner.pp * learner.vpp, learner.stage_layers)
            lines.insert(2, ("stages", f"{' + '.join(map(str, stages))} layers, the last with the head"))
    return lines
