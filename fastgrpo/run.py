"""Everything the loop works with, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.checkpoint import Checkpoints
from fastgrpo.config import Config
from fastgrpo.console import Console
from fastgrpo.data import PromptStream
from fastgrpo.exports import Exports
from fastgrpo.learner.protocol import Learner
from fastgrpo.metrics import Ledger, MetricsLog, Sample
from fastgrpo.models.flops import Batch
from fastgrpo.phases import Phase, Phases
from fastgrpo.profiler import Profiler
from fastgrpo.ranks import Ranks
from fastgrpo.sampler.protocol import Sampler
from fastgrpo.task import Task
from fastgrpo.types import LogprobContract, SamplingParams
from fastgrpo.unfinished import Unfinished
from fastgrpo.weights import Exchange


@dataclass(kw_only=True)
class Run:
    """Everything the loop works with; fastgrpo/assemble.py makes one from a configuration."""

    config: Config
    run_dir: Path
    task: Task
    sampling: SamplingParams
    contract: LogprobContract
    """What the sampler's logprobs mean, checked against the objective."""
    stream: PromptStream
    unfinished: Unfinished
    """Completions that go on in the next step; always empty with sampler.oversample=0."""
    learner: Learner
    sampler: Sampler | None
    """None on ranks that do not sample."""
    sampling_ranks: Ranks
    """Where this process stands among those that sample; its data ranks each draw their share of a step. Leaders score
    it too."""
    exchange: Exchange
    phases: Phases
    """Whose turn it is to hold the memory."""
    log: MetricsLog | None
    """None but on the main rank."""
    console: Console
    ledger: Ledger
    profiler: Profiler
    checkpoints: Checkpoints
    flops: Callable[[Batch], float]
    """What an update needs for a batch."""
    peak_flops: float | None
    """What the device can do in a second; None where that is not known."""
    export: Callable[[Path], None]
    """Writes the policy as a Hugging Face directory."""
    exports: Exports
    """Those of every checkpoint.export_every steps."""
    step: int = 0
    """The last step that is done."""
    num_nonfinite: int = 0
    """Updates skipped in a row."""

    def enter(self, phase: Phase) -> None:
        """Hand the memory over to the one whose turn it is."""
        with self.ledger("share"):
            self.phases.enter(phase)

    def log_samples(self, samples: Iterable[Sample]) -> None:
        """Keep completions for people to read."""
        if self.log is not None:
            self.log.write_samples(samples)
