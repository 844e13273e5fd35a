"""What `fastgrpo train`, `eval` and `plan` do with a configuration."""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.config import AlgorithmConfig, Config, UserError
from fastgrpo.functions.loading import name_of
from fastgrpo.nodes import num_nodes
from fastgrpo.time_limit import TimeLimit
from fastgrpo.validate import validate

if TYPE_CHECKING:
    from fastgrpo.plan import Plan
    from fastgrpo.ranks import Ranks


def train(
    config: Config,
    text: str,
    reward: Callable[..., Any] | None = None,
    environment: Callable[..., Any] | None = None,
    *,
    began: float | None = None,
) -> tuple[int | None, Path]:
    """Train, export and report. Returns the exit code of what stopped the run early, a signal or its time limit, or
    None, and the run's directory.

    text: the resolved configuration as YAML, kept as run.dir/config.yaml. reward, environment: functions in place of
    their paths. began: when the time that the run may take did, by time.monotonic; None: now. Raises UserError for what
    the user can mend.
    """
    limit = TimeLimit(config.train.time_limit_minutes, time.monotonic() if began is None else began)
    if environment is not None:  # named, so that whatever asks whether there is one hears of it
        name = name_of(environment, "environment")
        config = replace(config, environment=replace(config.environment, path=name))
    with _over_nodes():
        return _train(config, text, reward, environment, limit)


def _train(
    config: Config,
    text: str,
    reward: Callable[..., Any] | None,
    environment: Callable[..., Any] | None,
    limit: TimeLimit,
) -> tuple[int | None, Path]:
    warnings = validate(config)
    from safetensors import SafetensorError

    from fastgrpo import trainer
    from fastgrpo.agreement import check_settings
    from fastgrpo.assemble import assemble
    from fastgrpo.ranks import join_job
    from fastgrpo.report import write_report
    from fastgrpo.signals import StopRequest

    ranks = join_job()
    # The default holds the time, which is not the same on every rank.
    config = replace(config, run=replace(config.run, dir=ranks.from_main(config.run.dir)))
    run_dir = Path(config.run.dir).expanduser()
    check_settings(config, ranks)
    with _claimed(run_dir, config, ranks), assemble(config, ranks, reward, environment) as run:
        for warning in warnings:
            run.console.message(f"warning: {warning}")
        try:
            if ranks.is_main:
                _point_latest_to(run_dir, run.console.message)
                (run_dir / "config.yaml").write_text(text, encoding="utf-8")
            with StopRequest(run.console.message, limit) as stop:
                trainer.train(run, stop)
            if stop.code is None and config.checkpoint.export:
                run.export(run_dir / "hf")
            if not ranks.is_main:
                return stop.code, run_dir
            if missed := run.profiler.missed():
                run.console.message(f"run.profile_steps={missed}: not profiled, as this run did not make these steps")
            page = write_report(run_dir)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"run.dir={config.run.dir}: {error}; make room or mend the disk, then go on with resume=auto "
                "(checkpoints written before are whole)"
            ) from error
        if stop.code is None:
            policy = f"the policy is in {run_dir / 'hf'}, " if config.checkpoint.export else ""
            run.console.message(f"done: {policy}the report in {page}")
        else:
            run.console.message(f"stopped after step {run.step}, saved; go on with run.dir={run_dir} resume=auto")
    return stop.code, run_dir


def evaluate(config: Config) -> dict[str, float]:
    """Held-out metrics of model.path, or of the checkpoint that `resume` names, as a run with this configuration would
    measure them; {} but on the main rank.

    Raises UserError for what the user can mend.
    """
    with _over_nodes():
        return _evaluate(config)


def _evaluate(config: Config) -> dict[str, float]:
    validate(config)
    from fastgrpo import evaluate as evaluation
    from fastgrpo.agreement import check_settings
    from fastgrpo.assemble import assemble
    from fastgrpo.ranks import join_job
    from fastgrpo.trainer import share

    # Nothing is ever learned; but Megatron's gradients and optimizer are there all the same.
    offload = "never" if config.learner.kind == "torch" else config.learner.offload
    config = replace(
        config,
        run=replace(config.run, console="none"),
        algorithm=AlgorithmConfig(kl_coef=0.0),  # no reference model, and no functions of the objective
        learner=replace(config.learner, offload=offload),
    )
    ranks = join_job()
    check_settings(config, ranks)
    with assemble(config, ranks, only_evaluates=True) as run:
        share(run)
        metrics = evaluation.evaluate(run)
    return metrics if ranks.is_main else {}


def plan(config: Config) -> tuple[Plan, str]:
    """What a run would do and hold, and the same as a page of text. Raises UserError for what the user can mend."""
    learner = config.learner
    fewest = math.lcm(math.lcm(learner.tp, learner.ep) * learner.cp * learner.pp, config.sampler.tp)
    num_ranks = config.cluster.num_ranks or fewest
    validate(config, num_ranks)
    from fastgrpo.batch_algebra import batch_algebra
    from fastgrpo.learners import check_layout
    from fastgrpo.models.shape import Shape
    from fastgrpo.plan import device_to_plan_for, make_plan, table
    from fastgrpo.policy import config_of_model
    from fastgrpo.task import load_data

    tokenizer, prompts = load_data(config)
    model_config = config_of_model(config, tokenizer)
    check_layout(config, model_config, num_ranks)
    device_bytes, on_gpu = device_to_plan_for(config)
    plan = make_plan(
        config,
        model_config,
        device_bytes=device_bytes,
        on_gpu=on_gpu,
        longest_prompt=prompts.max_tokens,
        num_ranks=num_ranks,
    )
    model = f"{model_config.model_type}, {Shape.of(model_config).num_parameters() / 1e6:.1f}M parameters"
    lines = batch_algebra(config, prompts, num_ranks, model, model_config)
    algebra = "\n".join(f"{label:<14}{value}" for label, value in lines)
    return plan, f"{algebra}\n\n{table(plan)}"


def _over_nodes() -> AbstractContextManager[None]:
    """Where a job has several nodes, the first process that fails in the block ends those of all."""
    if num_nodes() == 1:
        return nullcontext()
    from fastgrpo.lookout import failing_together

    return failing_together()


@contextmanager
def _claimed(run_dir: Path, config: Config, ranks: Ranks) -> Iterator[None]:
    """Make the run's directory, if it can be written, is nobody else's and all nodes see it, and keep it meanwhile."""
    from fastgrpo.agreement import check_run_dir

    with _made(run_dir, config) if ranks.is_main else nullcontext():
        check_run_dir(config, ranks)
        yield


@contextmanager
def _made(run_dir: Path, config: Config) -> Iterator[None]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK):
            raise PermissionError("not writable")
        directory = os.open(run_dir, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"run.dir={config.run.dir}: cannot be written: {error}; choose another") from error
    try:
        with suppress(OSError):  # some network file systems have no locks
            _lock(directory, config)
        if config.resume == "no" and (run_dir / "metrics.jsonl").exists():
            raise UserError(f"run.dir={config.run.dir} holds a run already: set resume=auto or another run.dir")
        yield
    finally:
        os.close(directory)  # which unlocks it, as a kill does


def _lock(directory: int, config: Config) -> None:
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"run.dir={config.run.dir}: another process trains there; stop it or choose another") from None


def _point_latest_to(run_dir: Path, notify: Callable[[str], object]) -> None:
    """A convenience, which a file system without links does not have."""
    runs, place = Path("runs").resolve(), run_dir.resolve()
    # As it is named too: what is under runs/ may be links to another disk.
    if runs in place.parents or Path("runs").absolute() in run_dir.absolute().parents:
        fresh = runs / f".latest-{os.getpid()}"  # another run may begin at the same moment
        try:
            fresh.symlink_to(os.path.relpath(place, runs))
            fresh.replace(runs / "latest")
        except OSError as error:
            fresh.unlink(missing_ok=True)
            notify(f"runs/latest does not point to this run ({error})")
