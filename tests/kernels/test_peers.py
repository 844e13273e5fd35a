"""The same objective, computed by others: Liger's fused linear GRPO loss and TRL's GRPOTrainer.

Where definitions differ the objective is translated, and the translation is the documentation:
- CISPO: theirs caps the ratio at epsilon_high itself and knows no lower bound; ours at 1 + clip_ratio_high and
  at 1 - clip_ratio_low, so epsilon_high = 1 + clip_ratio_high and clip_ratio_low = 1.
- Dual clip: their delta caps the ratio for either sign of the advantage, ours only for negative ones; above
  1 + epsilon_high a positive advantage is clipped already, so both are equal there.
- KL times ratio: theirs takes the ratio of the importance-sampling level, ours the token's; equal at token level.
- Aggregation: theirs is a loss_type, ours the token weights.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fastgrpo.kernels import reference
from fastgrpo.kernels.linear_policy_loss import linear_policy_loss
from fastgrpo.kernels.objective import LossInputs, Objective

B, L, H, V = 4, 7, 12, 101
BETA = 0.04

# loss_type, our objective, their further options
CASES = {
    "grpo": ("grpo", {"kl_coef": BETA}, {}),
    "dapo clip higher": ("dapo", {"clip_ratio_high": 0.28}, {"epsilon_high": 0.28}),
    "dr_grpo with k3": ("dr_grpo", {"kl_coef": BETA}, {}),
    "bnpo, temperature": ("bnpo", {"temperature": 0.7}, {"temperature": 0.7}),
    "dual clip": ("dapo", {"dual_clip": 1.5, "kl_coef": BETA}, {"delta": 1.5}),
    "cispo": ("cispo", {"surrogate": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": 0.3}, {"epsilon_high": 1.3}),
    "sapo": ("sapo", {"surrogate": "sapo", "kl_coef": BETA}, {}),
    "gspo": (
        "grpo",
        {"ratio_level": "sequence", "clip_ratio_low": 0.05, "clip_ratio_high": 0.05},
        {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.05},
    ),
    "k3 x ratio": ("grpo", {"kl_coef": BETA, "kl_times_ratio": True}, {"use_bias_correction_kl": True}),
}


def random_batch(temperature):
    rng = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 3, 5, 6])
    mask = (torch.arange(L) < lengths[:, None]).float()
    hidden = torch.randn(B, L, H, generator=rng).double().requires_grad_()
    weight = (torch.randn(V, H, generator=rng) / H**0.5).double().requires_grad_()
    targets = torch.randint(0, V, (B, L), generator=rng)
    log_p = reference.linear_logprobs(
        hidden.detach().flatten(0, 1), weight.detach(), targets.flatten(), temperature=temperature
    ).view(B, L)
    old = log_p + 0.4 * torch.randn(B, L, generator=rng)
    ref = log_p + 0.4 * torch.randn(B, L, generator=rng)
    return hidden, weight, targets, mask, torch.randn(B, generator=rng).double(), old, ref


def token_weights(loss_type, mask):
    if loss_type in ("grpo", "sapo"):
        return mask / (B * mask.sum(1, keepdim=True))
    if loss_type == "dr_grpo":
        return mask / (B * L)
    return mask / mask.sum()  # dapo, bnpo, cispo


def ours(loss_type, objective, hidden, weight, targets, mask, advantages, old, ref):
    batch = LossInputs(
        targets=targets.flatten(),
        advantages=advantages[:, None].expand(B, L).flatten(),
        token_weights=token_weights(loss_type, mask).flatten(),
        old_logprobs=old.flatten(),
        ref_logprobs=ref.flatten(),
        cu_seqlens=torch.arange(B + 1) * L,
    )
    return linear_policy_loss(hidden.flatten(0, 1), weight, batch, Objective(**objective), chunk_size=10).loss


def assert_same(theirs, loss, hidden, weight, tolerance):
    """Liger turns logits into float32, so it agrees to float32's digits; TRL's formulas stay in float64."""
    assert loss.item() == pytest.approx(theirs.item(), rel=tolerance)
    want = torch.autograd.grad(theirs, (hidden, weight))
    for got, expected in zip(torch.autograd.grad(loss, (hidden, weight)), want, strict=True):
        assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("name", CASES)
def test_liger_fused_linear_grpo(name):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    loss_type, objective, options = CASES[name]
    data = random_batch(objective.get("temperature", 1.0))
    hidden, weight, targets, mask, advantages, old, ref = data
    peer = chunked_loss.LigerFusedLinearGRPOLoss(
        compiled=False,
        use_ref_model=objective.get("kl_coef", 0.0) > 0,
        beta=objective.get("kl_coef", 0.0),
        loss_type=loss_type,
        max_completion_length=L,
        **options,
    )
    theirs, _ = peer(hidden, weight, targets, mask, advantages, ref_per_token_logps=ref, old_per_token_logps=old)
    assert_same(theirs, ours(loss_type, objective, *data), hidden, weight, 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_trl_grpo_trainer(name):
    trl = pytest.importorskip("trl")
    loss_type, objective, options = CASES[name]
    temperature = objective.get("temperature", 1.0)
    data = random_batch(temperature)
    hidden, weight, targets, mask, advantages, old, ref = data

    def logprobs_and_entropies(*args, **kwargs):
        log_p, entropy = reference.linear_logprobs(
            hidden.flatten(0, 1), weight, targets.flatten(), temperature=temperature, entropy=True
        )
        return log_p.view(B, L), entropy.view(B, L), None

    options = {"epsilon_low": 0.2, "epsilon_high": 0.2, "importance_sampling_level": "token", "delta": None} | options
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=logprobs_and_entropies,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        beta=objective.get("kl_coef", 0.0),
        loss_type=loss_type,
        use_vllm=False,
        max_completion_length=L,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x),
        _entropy_bonus_enabled=False,
        entropy_coef=0.0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        epsilon_low=options["epsilon_low"],
        epsilon_high=options["epsilon_high"],
        importance_sampling_level=options["importance_sampling_level"],
        args=SimpleNamespace(
            delta=options["delta"],
            use_bias_correction_kl=options.get("use_bias_correction_kl", False),
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
        ),
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": targets,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    theirs = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    assert_same(theirs, ours(loss_type, objective, *data), hidden, weight, 1e-6)
