"""The learner for models that outgrow a device: Megatron-core's layers, schedules and optimizer, our loss head.

Every rank of the job calls every method, with the batches of its own data-parallel rank; the ranks that share one
copy of the model pass the same batches. What a method returns is the same on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from fastgrpo.config import TrainConfig
from fastgrpo.kernels.objective import Objective
from fastgrpo.learner.expert_balance import ExpertBalance
from fastgrpo.learner.host_memory import HostMemory
from fastgrpo.learner.megatron import convert, head, lora, parallel, sharded_checkpoint
from fastgrpo.learner.megatron.architecture import Architecture
from fastgrpo.learner.megatron.convert import Read
from fastgrpo.learner.megatron.cpu import megatron_on_cpu
from fastgrpo.learner.megatron.experts import watch_routers
from fastgrpo.learner.megatron.hf_weights import from_directory
from fastgrpo.learner.megatron.layout import Layout, data_parallel_size
from fastgrpo.learner.megatron.microbatch import MicroBatch, prepare, scored_share
from fastgrpo.learner.megatron.model import HiddenStatesModel, build
from fastgrpo.learner.megatron.optimizer import Optimizer
from fastgrpo.learner.megatron.sums import reduce_sums
from fastgrpo.learner.metrics import LossSums
from fastgrpo.learner.offload import Offload
from fastgrpo.learner.optimizer import learning_rate, move_towards
from fastgrpo.learner.protocol import PendingSave
from fastgrpo.models.lora import Adapters
from fastgrpo.types import PackedBatch, StepResult, WeightSlice

LossFunction = Callable[..., Any]


class MegatronLearner:
    """One rank's part of the policy, its optimizer and, where the KL term needs it, the reference.

    architecture, read: what the model is and where its weights are read (convert.Read). num_updates: optimizer steps
    of the whole run, for the learning-rate schedule. reference: load the reference model, from the same weights, or
    with other_reference that one, which stays in its file.
    adapters: begin with these and train nothing else; the policy without them is its own reference, and none is loaded.
    merge_adapters: hold the merged matrices too, and offer a sampler these.

    Raises UserError, before any weight is read, where the layout is impossible for the model or the job's size, or the
    adapters are of a kind that is not supported.
    """

    def __init__(
        self,
        architecture: Architecture,
        read: Read,
        layout: Layout,
        config: TrainConfig,
        *,
        num_updates: int,
        reference: bool = False,
        other_reference: tuple[Architecture, Read] | None = None,
        adapters: Adapters | None = None,
        merge_adapters: bool = False,
        dtype: torch.dtype = torch.float32,
        activation_checkpoint: str = "none",
        distributed_optimizer: bool = True,
        overlap_grad_reduce: bool = False,
    ) -> None:
        if adapters is not None:
            architecture = replace(architecture, adapters=lora.shape_of(adapters, architecture))
            read = lora.reading(adapters, read)
        data_parallel_size(layout, architecture, dist.get_world_size() if dist.is_initialized() else 1)
        self.config, self.num_updates, self.policy_version = config, num_updates, 0
        self.parallel = parallel.initialize(layout)
        self.ranks = self.parallel.ranks
        with megatron_on_cpu():
            self.policy = build(architecture, layout, dtype=dtype, activation_checkpoint=activation_checkpoint)
            for chunk in self.policy if adapters is not None else []:
                lora.add_adapters(chunk, self.parallel.place, keep_merged=merge_adapters)
            convert.load(self.policy, read, self.parallel)
            lora.merge(self.policy)
            self.reference: list[HiddenStatesModel] | None = None
            self.kept_reference: list[HiddenStatesModel] | None = None
            """What moves and is saved of it."""
            if reference and other_reference is not None:
                of, read = other_reference
                self.reference = build(of, replace(layout, stage_layers=None), dtype=dtype)
                convert.load(self.reference, read, self.parallel)
            elif reference and adapters is None:
                self.reference = self.kept_reference = build(architecture, layout, dtype=dtype)
                self.move_reference(1.0)  # from the policy: its files are read once
            for chunk in self.reference or []:
                chunk.eval().requires_grad_(False)
            self.ddp = _data_parallel(
                self.policy,
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=distributed_optimizer,
                overlap_grad_reduce=overlap_grad_reduce,
            )
            self.optimizer = Optimizer(self.ddp, config, dtype)
        self.device = self.policy[0].inv_freq.device
        self.balance = watch_routers(self.policy, architecture, config.moe_aux_loss_coef, self.device)
        self._offload, self._saved = Offload(), HostMemory()

    @classmethod
    def from_pretrained(
        cls, path: str, layout: Layout, config: TrainConfig, *, reference_path: str | None = None, **kwargs: Any
    ) -> MegatronLearner:
        """The learner of a local Hugging Face directory with safetensors, its reference perhaps another's. Raises
        UserError, naming model.path or algorithm.reference.path."""
        from fastgrpo.models.hf import REFERENCE_KEY, load_config

        if reference_path is not None:
            of = Architecture.of(load_config(reference_path, REFERENCE_KEY))
            kwargs["other_reference"] = (of, from_directory(reference_path))
        return cls(Architecture.of(load_config(path)), from_directory(path), layout, config, **kwargs)

    # --- the update -------------------------------------------------------------------------------------------------

    def update(self, batches: Iterable[PackedBatch], objective: Objective) -> StepResult:
        """See Learner.update. Data-parallel ranks may pass different numbers of batches, also none, unless `ranks` says
        in_step: token weights are global, so gradients are summed over everything and divided by nothing."""
        with megatron_on_cpu():
            sums = reduce_sums(self.accumulate(batches, objective), objective, self.parallel, self.device)
            grad_norm = self.optimizer.grad_norm()
            metrics = sums.means() | ({} if self.balance is None else self.balance.metrics())
            rate = learning_rate(self.config, self.policy_version, self.num_updates)
            skipped = not (math.isfinite(grad_norm) and math.isfinite(metrics["loss"]))
            if not skipped and sums.num_batches:
                self.optimizer.step(rate, grad_norm)
                self.policy_version += 1
                lora.merge(self.policy)
        return StepResult(
            policy_version=self.policy_version,
            loss=metrics.pop("loss"),
            grad_norm=grad_norm,
            skipped=skipped,
            metrics={**metrics, "learning_rate": rate},
        )

    def accumulate(self, batches: Iterable[PackedBatch], objective: Objective) -> LossSums:
        """Fresh gradients of all ranks' batches in every parameter's main_grad; returns this rank's sums."""
        assert not self._offload.is_out, "onload() comes before an update"
        self.optimizer.zero_grad()
        sums = LossSums()
        for chunk in self.ddp:
            chunk.train()

        def loss_of(model: HiddenStatesModel, batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict]:
            batch, _ = scored_share(batch, self.parallel, whole_sequences=objective.relates_tokens)
            output = head.policy_loss(model, hidden, batch, objective, self.parallel)
            if batch.num_scored:
                sums.add(output, batch)
            return output.loss, torch.ones((), dtype=torch.int), {}

        with megatron_on_cpu():
            micro_batches = prepare(batches, self.parallel, self.device)
            if self.balance is None:
                self._run(self.ddp, micro_batches, loss_of)
            else:
                self._run_balanced(self.balance, micro_batches, loss_of)
        return sums

    def _run_balanced(self, balance: ExpertBalance, micro_batches: list[MicroBatch], loss_of: LossFunction) -> None:
        """The gradients of a mixture of experts, whose auxiliary loss wants the update's choices counted first."""
        if balance.coef:
            balance.start("count")
            with torch.no_grad():
                self._run(self.ddp, micro_batches, _nothing, forward_only=True)
            dist.all_reduce(balance.choices)  # a rank holds some layers and sees some tokens, each once
            balance.freeze()
        balance.start("train")
        self._run(self.ddp, micro_batches, loss_of)
        balance.phase = "off"
        for sums in balance.sums:
            dist.all_reduce(sums)

    # --- looking ----------------------------------------------------------------------------------------------------

    def logprobs(self, batch: PackedBatch, *, temperature: float, reference: bool = False) -> Tensor:
        """See Learner.logprobs."""
        return self.logprobs_of([batch], temperature=temperature, reference=reference)[0]

    @torch.no_grad()
    def logprobs_of(
        self, batches: Sequence[PackedBatch], *, temperature: float, reference: bool = False
    ) -> list[Tensor]:
        """See Learner.logprobs_of."""
        is_base = reference and self.reference is None and self.policy[0].architecture.adapters is not None
        chunks = self.reference if reference and not is_base else self.policy
        assert chunks is not None, "no reference model was loaded"
        if reference:  # a policy of its own, which routes by itself
            batches = [replace(batch, routed_experts=None) for batch in batches]
        with lora.disabled(chunks) if is_base else nullcontext():
            return self._looked_at(chunks, batches, temperature)[0]

    @torch.no_grad()
    def logprobs_and_entropies(
        self, batches: Sequence[PackedBatch], *, temperature: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See Learner.logprobs_and_entropies."""
        logprobs, entropies = self._looked_at(self.policy, batches, temperature, entropy=True)
        return logprobs, entropies

    def _looked_at(
        self, chunks: list[Any], batches: Sequence[PackedBatch], temperature: float, *, entropy: bool = False
    ) -> list[list[Tensor]]:
        """The batches' logprobs, and their entropies: one schedule, so that a pipeline is filled and emptied once."""
        if not batches:
            return [[], []]
        micro_batches = prepare(batches, self.parallel, self.device)
        num_kinds = 2 if entropy else 1
        of_batch = {
            id(item.batch): torch.zeros(num_kinds, item.batch.num_scored, device=self.device) for item in micro_batches
        }

        def keep(model: HiddenStatesModel, batch: PackedBatch, hidden: Tensor, **_: Any) -> None:
            share, place = scored_share(batch, self.parallel, whole_sequences=False)
            found = head.logprobs(model, hidden, share, temperature, self.parallel, entropy=entropy)
            of_batch[id(batch)][:, place] = found

        for chunk in chunks:
            chunk.eval()
        with megatron_on_cpu():
            self._run(chunks, micro_batches, keep, forward_only=True)
        result = torch.cat(list(of_batch.values()), 1)
        if self.parallel.layout.cp > 1:
            dist.all_reduce(result, group=self.parallel.cp_group)  # every rank has filled its share
        if self.parallel.layout.pp > 1:
            dist.broadcast(result, src=self.parallel.last_stage, group=self.parallel.pp_group)
        counts = [batch.num_scored for batch in batches]
        return [list(values.split(counts)) for values in result.cpu()]

    def _run(
        self, chunks: list[Any], micro_batches: list[MicroBatch], of_hidden: LossFunction, *, forward_only: bool = False
    ) -> None:
        """Megatron's schedule over the micro-batches; of_hidden(model, batch, hidden) runs on the last stage."""

        def forward(iterator: Iterator[MicroBatch], chunk: nn.Module) -> tuple[Tensor, LossFunction]:
            item = next(iterator)
            model: Any = chunk if isinstance(chunk, HiddenStatesModel) else chunk.module
            batch = item.batch
            hidden = chunk(
                input_ids=batch.token_ids[None],
                position_ids=batch.position_ids[None],
                attention_mask=None,
                packed_seq_params=item.packed,
                padding_mask=item.for_routers.to(self.device, non_blocking=True) if model.has_routers else None,
            )
            return hidden, partial(of_hidden, model, batch)

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(micro_batches) for _ in chunks],
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].batch.num_tokens,  # micro-batches tell each other their real lengths
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    # --- weights and state ------------------------------------------------------------------------------------------

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See Learner.named_weights; adapters are merged. Full tensors on every rank; all ranks of a model must go
        through it together."""
        yield from convert.to_hf(self.policy, self.parallel)

    def named_adapters(self) -> Iterator[tuple[str, Tensor]]:
        """See Learner.named_adapters."""
        yield from convert.to_hf(self.policy, self.parallel, adapters=True)

    def weight_slices(self) -> list[WeightSlice]:
        """What this rank holds of the policy, in a Hugging Face checkpoint's terms, each once (a tied head is its
        embedding). Views of the live parameters, whose addresses never change: an update shows in them at once."""
        return convert.slices(self.policy, self.parallel)

    @torch.no_grad()
    def move_reference(self, share: float) -> None:
        """See Learner.move_reference; nothing without a reference."""
        if self.kept_reference is None or share == 0.0:
            return
        both = (self.kept_reference, self.policy)
        theirs, ours = ([p for chunk in chunks for p in chunk.parameters()] for chunks in both)
        move_towards(theirs, ours, share)

    def begin_save(self, directory: Path, *, copy: bool = False) -> PendingSave:
        """See Learner.begin_save and sharded_checkpoint: every layout can load it. Megatron's files are written from
        the host's memory, so the state is copied there in any case."""
        assert not self._offload.is_out, "onload() comes before a save"
        return sharded_checkpoint.begin_save(self, directory, self._saved)

    def load(self, directory: Path) -> None:
        """Go on from a state that any layout saved; see sharded_checkpoint.load."""
        assert not self._offload.is_out, "onload() comes before load()"
        sharded_checkpoint.load(self, directory)
        lora.merge(self.policy)

    def offload(self) -> None:
        """See Learner.offload."""
        self._offload.out(self.optimizer.state(), drop=self.optimizer.gradient_buffers())

    def onload(self) -> None:
        """See Learner.onload."""
        self._offload.back()


def _data_parallel(chunks: list[HiddenStatesModel], **settings: Any) -> list[DistributedDataParallel]:
    """Updated weights are gathered at once, never during the next forward pass: the sampler reads them before."""
    wrapped = [
        DistributedDataParallel(chunk.config, DistributedDataParallelConfig(**settings), chunk) for chunk in chunks
    ]
    if settings["overlap_grad_reduce"]:  # gradients are summed in the last micro-batch's backward pass alone
        waiting = [chunk.no_sync for chunk in wrapped]
        chunks[0].config.no_sync_func = waiting[0] if len(waiting) == 1 else waiting
    return wrapped


def _nothing(*_: Any, **__: Any) -> None:
    """What a pass that only counts does with the hidden states."""
