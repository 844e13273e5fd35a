"""From a configuration to everything the loop works with."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastgrpo.agreement import check_functions
from fastgrpo.batch_algebra import batch_algebra
from fastgrpo.checkpoint import Checkpoints
from fastgrpo.config import Config, UserError
from fastgrpo.console import Console
from fastgrpo.data import PromptSets, PromptStream
from fastgrpo.exports import Exports
from fastgrpo.kernels import varlen_kernels
from fastgrpo.kernels.objective import Objective
from fastgrpo.learners import make_learner
from fastgrpo.metrics import Ledger
from fastgrpo.models import hf
from fastgrpo.models.flops import peak_flops, update_flops
from fastgrpo.models.shape import Shape
from fastgrpo.phases import Phase, Phases
from fastgrpo.plan import Plan, device_memory, make_plan
from fastgrpo.policy import describe, device_of, export
from fastgrpo.profiler import Profiler
from fastgrpo.ranks import Ranks
from fastgrpo.resume import find_checkpoint, open_log, restore
from fastgrpo.run import Run
from fastgrpo.sampler.protocol import Sampler
from fastgrpo.samplers import make_exchange, make_sampler
from fastgrpo.task import load_task
from fastgrpo.types import LogprobContract, SamplingParams
from fastgrpo.unfinished import Unfinished


def check_contract(contract: LogprobContract, objective: Objective) -> None:
    """Raise UserError where the sampler's logprobs are not what the objective compares with the learner's."""
    if objective.asks("sampler_logprobs") and contract.renormalized:
        assert objective.custom is not None
        raise UserError(
            f"algorithm.surrogate={objective.custom.name} asks for `sampler_logprobs`, which top_p, top_k or "
            "min_new_tokens renormalise; use sampling.top_p=1, sampling.top_k=0 and sampling.min_new_tokens=0"
        )
    if contract.temperature != objective.temperature:
        raise UserError(
            f"sampling.temperature={objective.temperature}: the sampler's logprobs are of temperature "
            f"{contract.temperature}, so ratios to them would be wrong; use a sampler that reports processed logprobs"
        )


def set_up_torch(config: Config) -> None:
    """Threads, determinism and whose attention, for the whole process. Raises UserError for one that is not there."""
    attention, device = config.cluster.attention, device_of(config)[0]
    on_cpu = device == "cpu"
    if on_cpu and attention != "auto":
        raise UserError(f"cluster.attention={attention}: it is a GPU's and this run is on a CPU; use auto")
    if not on_cpu:
        if ":" in device:
            torch.cuda.set_device(device)  # kernels are launched on the current one, wherever their tensors are
        try:
            varlen_kernels.choose(attention)
        except ValueError as error:
            raise UserError(f"cluster.attention={attention}: {error}") from None
    if config.cluster.num_threads is not None:
        torch.set_num_threads(config.cluster.num_threads)
    if config.deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all we read is written


@contextmanager
def assemble(
    config: Config,
    ranks: Ranks,
    reward: Callable[..., Any] | None = None,
    environment: Callable[..., Any] | None = None,
    *,
    only_evaluates: bool = False,
) -> Iterator[Run]:
    """Everything a run needs, closed again at the end, also after an error.

    ranks: this process's place in the job (ranks.join_job). reward, environment: functions in place of their paths.
    only_evaluates: the run writes nothing, needs held-out prompts, and takes a checkpoint's policy alone.
    Raises UserError for whatever the user can mend.
    """
    run_dir = Path(config.run.dir).expanduser()
    set_up_torch(config)
    with ExitStack() as stack:
        ledger = Ledger(synchronize=torch.cuda.synchronize if torch.cuda.is_available() else None)
        mode = config.run.console if ranks.is_main else "none"
        console = Console(mode, num_steps=config.train.num_steps, activity=lambda: ledger.part)
        checkpoints = stack.enter_context(Checkpoints(run_dir, keep=config.checkpoint.keep, ranks=ranks))
        checkpoint = find_checkpoint(config, checkpoints, console.message)
        if only_evaluates and config.resume != "no" and checkpoint is None:
            raise UserError(f"resume={config.resume}: no checkpoint in {run_dir} to measure; give a run's directory")
        task = stack.enter_context(load_task(config, ranks, reward, environment, needs_eval_prompts=only_evaluates))
        check_functions(config, ranks)
        prompts = task.prompts
        learner, model, adapters = make_learner(config, task.tokenizer, prompts, ranks, console.message)
        stream = PromptStream(prompts.train, seed=config.seed, shuffle=config.data.shuffle)
        max_turns = 1 if task.environment is None else config.environment.max_turns
        unfinished = Unfinished(config.sampling.max_new_tokens, max_turns)
        state: dict[str, Any] = {"step": 0, "num_nonfinite": 0}
        if checkpoint is not None and only_evaluates:
            learner.load(checkpoint.learner)
        elif checkpoint is not None:
            state = restore(checkpoint, learner, stream, unfinished, prompts)
            unfinished.check_routed_experts(config.learner.router_replay)
            console.message(f"resuming after step {checkpoint.step} from {checkpoint.path}")
        plan = plan_memory(config, model.config, prompts, ranks)
        if plan.offload:
            learner.offload()  # before the sampler takes what the plan says is left then
        sampler, sampling_ranks = make_sampler(config, learner, model, adapters, prompts, plan, console.message)
        if sampler is not None:
            stack.push(partial(_close, sampler, ranks))
        if not sampling_ranks.leads:
            task.close_workers()
        exchange = make_exchange(config, learner, sampler, prompts, console.message)
        sampling = sampling_params(config, hf.stop_token_ids(model, task.tokenizer))
        contract = ranks.from_main(None if sampler is None else sampler.contract(sampling))
        assert contract is not None  # the main rank samples
        check_contract(contract, task.objective)
        described = describe(model, device_of(config)[0])
        console.banner(config.run.name, batch_algebra(config, prompts, ranks.num_ranks, described, model.config))
        write_policy = partial(export, learner=learner, model=adapters or model, tokenizer=task.tokenizer)
        exports = Exports(run_dir, write_policy, ranks)
        # Nothing can be refused any more, so what a resumed run begins anew may go.
        if config.resume != "no" and not only_evaluates:
            checkpoints.remove_after(state["step"])  # before their rows go, so that no checkpoint is without them
            exports.remove_after(state["step"])
        log = None
        if ranks.is_main and not only_evaluates:
            log = stack.enter_context(open_log(config, run_dir, state["step"] if checkpoint else None, console.message))
        stack.enter_context(console)
        run = Run(
            config=config,
            run_dir=run_dir,
            task=task,
            sampling=sampling,
            contract=contract,
            stream=stream,
            unfinished=unfinished,
            learner=learner,
            sampler=sampler,
            sampling_ranks=sampling_ranks,
            exchange=exchange,
            phases=Phases(learner, sampler, offload=plan.offload, planned=planned_bytes(plan)),
            log=log,
            console=console,
            ledger=ledger,
            profiler=make_profiler(config, ranks, ledger),
            checkpoints=checkpoints,
            step=state["step"],
            num_nonfinite=state["num_nonfinite"],
            flops=partial(update_flops, Shape.of(model.config), frozen=adapters is not None),
            peak_flops=peak_flops(*device_of(config)),
            export=write_policy,
            exports=exports,
        )
        # What is there by now stays. Looked through again and again it would hold up a step, and with it every rank.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        yield run
        run.phases.enter("rollout")  # an engine is closed awake, and needs the room that it had


def make_profiler(config: Config, ranks: Ranks, ledger: Ledger) -> Profiler:
    """What profiles the steps and ranks that the configuration names."""
    run = config.run
    of_ranks = range(ranks.num_ranks) if run.profile_ranks is None else run.profile_ranks
    directory, gpu = Path(run.dir).expanduser() / "profile", device_of(config)[0].startswith("cuda")
    return Profiler(directory, run.profile_steps, of_ranks, ranks, ledger, gpu=gpu)


def plan_memory(config: Config, model_config: Any, prompts: PromptSets, ranks: Ranks) -> Plan:
    """What this run will hold on this machine's device."""
    device = device_of(config)[0]
    return make_plan(
        config,
        model_config,
        device_bytes=device_memory(device),
        on_gpu=device != "cpu",
        longest_prompt=prompts.max_tokens,
        num_ranks=ranks.num_ranks,
    )


def planned_bytes(plan: Plan) -> dict[Phase, int]:
    """What the phases are expected to hold; nothing of a CPU, whose memory is not counted by the device."""
    return {"train": plan.train, "rollout": plan.rollout} if plan.on_gpu else {}


def _close(sampler: Sampler, ranks: Ranks, failure: type[BaseException] | None, *_: object) -> None:
    """Shut the sampler down. Not where this rank fails beside others on GPUs: ending NCCL's groups could wait for ranks
    that wait for this one, and nobody would read why."""
    if failure is None or ranks.num_ranks == 1 or not torch.cuda.is_available():
        sampler.close()


def sampling_params(config: Config, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    """What completions are drawn with; the model's own stop tokens where none are configured."""
    sampling = config.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens,
        stop_token_ids=stop_token_ids if sampling.stop_token_ids is None else tuple(sampling.stop_token_ids),
        return_routed_experts=config.learner.router_replay,
    )
