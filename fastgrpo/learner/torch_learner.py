"""The embedded learner: one Hugging Face model on one device, and the oracle for every other learner."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import TrainConfig, UserError
from fastgrpo.kernels.linear_logprobs import linear_logprobs
from fastgrpo.kernels.linear_policy_loss import linear_policy_loss
from fastgrpo.kernels.objective import Objective
from fastgrpo.learner.host_memory import HostMemory
from fastgrpo.learner.loss_inputs import loss_inputs
from fastgrpo.learner.metrics import LossSums
from fastgrpo.learner.offload import Offload
from fastgrpo.learner.optimizer import Optimizer, learning_rate, move_towards
from fastgrpo.learner.protocol import PendingSave
from fastgrpo.learner.routers import watch_routers
from fastgrpo.models import storage
from fastgrpo.models.attention import PackedAttention
from fastgrpo.models.decoder import hidden_states
from fastgrpo.models.hf import CausalLM
from fastgrpo.models.lora import Adapters
from fastgrpo.ranks import Ranks
from fastgrpo.types import PackedBatch, StepResult, WeightSlice


class TorchLearner:
    """Trains the model in place, so a sampler on the same module sees every update with nothing copied.

    model: loaded by fastgrpo.models.hf. reference: the KL term's model, or None where none is needed.
    is_own_reference: it began as the policy and is part of the state; else another model, which stays in its file.
    adapters: the model's LoRA adapters, or None; without them the model is its own reference where none is passed.
    num_updates: optimizer steps of the whole run, for the learning-rate schedule.
    """

    def __init__(
        self,
        model: CausalLM,
        config: TrainConfig,
        *,
        num_updates: int,
        reference: CausalLM | None = None,
        is_own_reference: bool = True,
        adapters: Adapters | None = None,
    ) -> None:
        self.model, self.config, self.num_updates, self.adapters = model, config, num_updates, adapters
        self.reference = None if reference is None else reference.eval().requires_grad_(False)
        self._kept_reference = self.reference if is_own_reference else None
        """What moves and is saved of it."""
        self.policy_version = 0
        self.ranks = Ranks()
        self.routers = watch_routers(model, config.moe_aux_loss_coef)
        self._offload, self._saved = Offload(), HostMemory()

    @cached_property
    def optimizer(self) -> Optimizer:
        """Made when it is needed: whoever only evaluates has no memory for it."""
        return Optimizer(self.model, self.config)

    def update(self, batches: Iterable[PackedBatch], objective: Objective) -> StepResult:
        """See Learner.update."""
        assert not self._offload.is_out, "onload() comes before an update"
        self.model.train()
        self.optimizer.zero_grad()
        sums = LossSums()
        for batch in self._watched(batches):
            batch = batch.to(self.model.device)
            output = linear_policy_loss(
                self._scored_hidden(self.model, batch), self._head, loss_inputs(batch), objective
            )
            output.loss.backward()
            sums.add(output, batch)
        grad_norm = float(self.optimizer.clip_grad_norm())
        metrics = sums.means() | ({} if self.routers is None else self.routers.balance.metrics())
        rate = learning_rate(self.config, self.policy_version, self.num_updates)
        skipped = not (math.isfinite(grad_norm) and math.isfinite(metrics["loss"]))
        if not skipped and sums.num_batches:
            self.optimizer.step(rate)
            self.policy_version += 1
            if self.adapters is not None:
                self.adapters.merge()
        self.optimizer.zero_grad()
        return StepResult(
            policy_version=self.policy_version,
            loss=metrics.pop("loss"),
            grad_norm=grad_norm,
            skipped=skipped,
            metrics={**metrics, "learning_rate": rate},
        )

    def logprobs(self, batch: PackedBatch, *, temperature: float, reference: bool = False) -> Tensor:
        """See Learner.logprobs."""
        return self.logprobs_of([batch], temperature=temperature, reference=reference)[0]

    @torch.no_grad()
    def logprobs_of(
        self, batches: Sequence[PackedBatch], *, temperature: float, reference: bool = False
    ) -> list[Tensor]:
        """See Learner.logprobs_of."""
        if reference:  # a policy of its own, which routes by itself
            batches = [replace(batch, routed_experts=None) for batch in batches]
            if self.reference is None and self.adapters is not None:
                with self.adapters.disabled():
                    return self._looked_at(self.model, batches, temperature)[0]
        model = self.reference if reference else self.model
        assert model is not None, "no reference model was loaded"
        return self._looked_at(model, batches, temperature)[0]

    @torch.no_grad()
    def logprobs_and_entropies(
        self, batches: Sequence[PackedBatch], *, temperature: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See Learner.logprobs_and_entropies."""
        logprobs, entropies = self._looked_at(self.model, batches, temperature, entropy=True)
        return logprobs, entropies

    def _looked_at(
        self, model: CausalLM, batches: Sequence[PackedBatch], temperature: float, *, entropy: bool = False
    ) -> list[list[Tensor]]:
        """The batches' logprobs, and their entropies; read once, so that no batch waits for the one before."""
        if not batches:
            return [[], []]
        was_training = model.training
        model.eval()
        found = [self._look(model, batch.to(self.model.device), temperature, entropy) for batch in batches]
        model.train(was_training)
        counts = [batch.num_scored for batch in batches]
        return [list(values.split(counts)) for values in torch.cat(found, 1).cpu()]

    def _look(self, model: CausalLM, batch: PackedBatch, temperature: float, entropy: bool) -> Tensor:
        """(1, N) logprobs, or (2, N) with the entropies, on the device."""
        with nullcontext() if self.routers is None else self.routers.replaying(batch):
            hidden = self._scored_hidden(model, batch)
        head, targets = model.lm_head.weight, batch.targets
        found = linear_logprobs(hidden, head, targets, temperature=temperature, entropy=entropy)
        return found[None] if isinstance(found, Tensor) else torch.stack(found)

    def _watched(self, batches: Iterable[PackedBatch]) -> Iterable[PackedBatch]:
        """The batches, while the routers of a mixture of experts are told which one is computed."""
        if self.routers is None:
            return batches
        return self.routers.during(batches, lambda batch: self._scored_hidden(self.model, batch))

    @property
    def _head(self) -> Tensor:
        return self.model.lm_head.weight

    def _scored_hidden(self, model: CausalLM, batch: PackedBatch) -> Tensor:
        """(N, H): only the rows that predict a scored token reach the loss head."""
        attend = PackedAttention(batch.segments, batch.token_ids.device)
        hidden = hidden_states(model, batch.token_ids, batch.position_ids, attend)  # (T, H)
        return hidden.index_select(0, batch.hidden_rows)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()

    def named_adapters(self) -> Iterator[tuple[str, Tensor]]:
        """See Learner.named_adapters."""
        yield from () if self.adapters is None else self.adapters.named()

    def weight_slices(self) -> list[WeightSlice]:
        """See Learner.weight_slices."""
        if self.adapters is not None and self.adapters.are_kept_merged:
            return self.adapters.merged_slices()
        return storage.weight_slices(self.model)

    @torch.no_grad()
    def move_reference(self, share: float) -> None:
        """reference += share * (policy - reference); nothing without a reference."""
        if self._kept_reference is None or share == 0.0:
            return
        theirs: list[Tensor] = list(self._kept_reference.parameters())
        ours: list[Tensor] = list(self.model.parameters())
        move_towards(theirs, ours, share)

    def offload(self) -> None:
        """See Learner.offload."""
        self._offload.out(self.optimizer.state())

    def onload(self) -> None:
        """See Learner.onload."""
        self._offload.back()

    def begin_save(self, directory: Path, *, copy: bool = False) -> PendingSave:
        """See Learner.begin_save: one file, learner.pt."""
        assert not self._offload.is_out, "onload() comes before a save"
        state, file = self.state_dict(), directory / "learner.pt"
        if copy:
            state = self._saved.copy_of(state)
        return PendingSave(files={file: partial(torch.save, state, file)})

    def load(self, directory: Path) -> None:
        """See Learner.load. Raises UserError where another kind of learner or model was saved."""
        assert not self._offload.is_out, "onload() comes before load()"
        file = directory / "learner.pt"
        if not file.is_file():
            raise UserError(f"resume={directory}: no state of a torch learner there")
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if self._kept_reference is not None and state["reference"] is None:
            raise UserError(
                f"resume={directory}: saved without a reference model; resume with algorithm.kl_coef=0, or with the "
                "algorithm.reference.path of then"
            )
        try:
            self.load_state_dict(state)
        except (RuntimeError, ValueError) as error:  # names or shapes
            raise UserError(
                f"resume={directory}: not a state of this model; resume with the model.path of then"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Everything that an update reads or changes."""
        reference = None if self._kept_reference is None else self._kept_reference.state_dict()
        return {
            "model": self._trained(),
            "reference": reference,
            "optimizer": self.optimizer.state_dict(),
            "policy_version": self.policy_version,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        trained = self._trained()
        if trained.keys() != state["model"].keys():
            raise ValueError("other parameters were trained")
        for name, parameter in trained.items():
            parameter.copy_(state["model"][name])
        if self.adapters is not None:
            self.adapters.merge()
        if self._kept_reference is not None:
            self._kept_reference.load_state_dict(state["reference"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy_version = state["policy_version"]

    def _trained(self) -> dict[str, Tensor]:
        """What updates change: every parameter, or the adapters alone."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
