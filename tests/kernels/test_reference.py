"""The oracle itself, against literal values, closed forms and finite differences."""

import itertools
import math

import pytest
import torch

from fastgrpo.kernels import reference
from fastgrpo.kernels.objective import CustomSurrogate, LossInputs, Objective

LOG2, LOG3 = math.log(2.0), math.log(3.0)


def tokens(**fields):
    """A LossInputs from lists; targets int64, the rest float64."""
    as_int = ("targets", "cu_seqlens")
    return LossInputs(
        **{k: torch.tensor(v, dtype=torch.int64 if k in as_int else torch.float64) for k, v in fields.items()}
    )


def loss_of(log_p, batch, objective, entropy=None):
    """Loss, d loss / d log_p and metrics from given logprobs: no softmax in the way."""
    log_p = torch.tensor(log_p, dtype=torch.float64, requires_grad=True)
    entropy = torch.zeros_like(log_p) if entropy is None else torch.tensor(entropy, dtype=torch.float64)
    loss, metrics = reference.token_loss(log_p, entropy, batch, objective)
    (grad,) = torch.autograd.grad(loss, log_p)
    return loss.item(), grad.tolist(), {k: v.item() for k, v in metrics.items()}


def test_logprobs_and_entropy_literal():
    logits = torch.tensor([[0.0, 0.0], [0.0, LOG3], [5.0, -torch.inf]], dtype=torch.float64)
    log_p, entropy = reference.logprobs(logits, torch.tensor([0, 1, 0]), entropy=True)
    assert log_p.tolist() == pytest.approx([-LOG2, math.log(0.75), 0.0], abs=1e-15)
    assert entropy.tolist() == pytest.approx([LOG2, 2 * LOG2 - 0.75 * LOG3, 0.0], abs=1e-15)


def test_temperature_divides_the_logits():
    log_p = reference.logprobs(torch.tensor([[0.0, 2 * LOG3]], dtype=torch.float64), torch.tensor([1]), temperature=2.0)
    assert log_p.item() == pytest.approx(math.log(0.75), abs=1e-15)


def test_ignored_row_is_zero_in_value_and_gradient():
    logits = torch.full((2, 3), torch.nan, dtype=torch.float64)
    logits[1] = 0.0
    logits.requires_grad_()
    log_p, entropy = reference.logprobs(logits, torch.tensor([reference.IGNORE_INDEX, 1]), entropy=True)
    (log_p.sum() + entropy.sum()).backward()
    assert (log_p[0].item(), entropy[0].item()) == (0.0, 0.0)
    assert logits.grad[0].tolist() == [0.0, 0.0, 0.0]
    assert logits.grad[1].tolist() == pytest.approx([-1 / 3, 2 / 3, -1 / 3])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad", "clipped"),
    [
        (1.5, 1.0, -1.2, 0.0, "clip_high_count"),
        (1.5, -1.0, 1.5, 1.5, None),
        (0.5, 1.0, -0.5, -0.5, None),
        (0.5, -1.0, 0.8, 0.0, "clip_low_count"),
        (1.0, 2.0, -2.0, -2.0, None),
    ],
)
def test_clip_literal(ratio, advantage, loss, grad, clipped):
    batch = tokens(targets=[0], advantages=[advantage], token_weights=[1.0], old_logprobs=[-1.0])
    got_loss, got_grad, metrics = loss_of([-1.0 + math.log(ratio)], batch, Objective())
    assert got_loss == pytest.approx(loss, rel=1e-12)
    assert got_grad == pytest.approx([grad], rel=1e-12)
    for name in ("clip_low_count", "clip_high_count", "dual_clip_count"):
        assert metrics[name] == (name == clipped)
    assert metrics["ratio_sum"] == pytest.approx(ratio)


def test_dual_clip_caps_only_negative_advantages():
    batch = tokens(targets=[0, 0], advantages=[-1.0, 1.0], token_weights=[1.0, 1.0], old_logprobs=[-3.0, -3.0])
    loss, grad, metrics = loss_of([-3.0 + math.log(5.0), -3.0 + math.log(0.5)], batch, Objective(dual_clip=3.0))
    assert loss == pytest.approx(3.0 - 0.5)
    assert grad == pytest.approx([0.0, -0.5])
    assert metrics["dual_clip_count"] == 1


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    batch = tokens(targets=[0, 0], advantages=[2.0, 2.0], token_weights=[1.0, 1.0], old_logprobs=[-1.0, -1.0])
    loss, grad, metrics = loss_of([-1.0 + math.log(1.5), -1.0], batch, Objective(surrogate="cispo"))
    assert grad == pytest.approx([-1.2 * 2.0, -2.0])
    assert loss == pytest.approx(-1.2 * 2.0 * (-1.0 + math.log(1.5)) + 2.0)
    assert (metrics["clip_low_count"], metrics["clip_high_count"]) == (0, 1)


def test_sapo_at_ratio_one_has_the_policy_gradient():
    batch = tokens(targets=[0, 0], advantages=[2.0, -2.0], token_weights=[1.0, 1.0])
    objective = Objective(surrogate="sapo", sapo_tau_pos=1.0, sapo_tau_neg=2.0)
    loss, grad, _ = loss_of([-1.0, -1.0], batch, objective)
    assert loss == pytest.approx(-(4 / 1) * 0.5 * 2.0 + (4 / 2) * 0.5 * 2.0)
    assert grad == pytest.approx([-2.0, 2.0])


def test_reinforce_with_importance_weights():
    batch = tokens(targets=[0], advantages=[2.0], token_weights=[0.5], importance_weights=[0.25])
    loss, grad, _ = loss_of([-3.0], batch, Objective(surrogate="reinforce"))
    assert (loss, grad) == (pytest.approx(0.5 * 0.25 * 6.0), pytest.approx([-0.25]))


@pytest.mark.parametrize(("estimator", "kl", "slope"), [("k1", -1.0, 1.0), ("k2", 0.5, -1.0), ("k3", math.e - 2, None)])
def test_kl_estimators_literal(estimator, kl, slope):
    """lp - ref = -1: k1 = -1, k2 = 1/2, k3 = e - 2 with slope 1 - e. importance_weights leave it alone."""
    batch = tokens(targets=[0], advantages=[0.0], token_weights=[1.0], ref_logprobs=[-1.0], importance_weights=[7.0])
    loss, grad, metrics = loss_of([-2.0], batch, Objective(kl_coef=0.1, kl_estimator=estimator))
    assert loss == pytest.approx(0.1 * kl)
    assert grad == pytest.approx([0.1 * (1 - math.e if slope is None else slope)])
    assert metrics["kl_sum"] == pytest.approx(math.e - 2, rel=1e-6)


def test_kl_times_ratio_differentiates_both_factors():
    """rho = 1, k3: d(rho * k)/d lp = k + dk/d lp = (e - 2) + (1 - e) = -1 at lp - ref = -1."""
    batch = tokens(targets=[0], advantages=[0.0], token_weights=[1.0], ref_logprobs=[-1.0])
    _, grad, _ = loss_of([-2.0], batch, Objective(kl_coef=1.0, kl_times_ratio=True))
    assert grad == pytest.approx([-1.0])


@pytest.mark.parametrize(("log_p", "slope"), [(-0.0, 1.0), (-60.0, 1 - math.exp(20.0))])
def test_k3_still_pulls_back_beyond_its_clamp(log_p, slope):
    batch = tokens(targets=[0], advantages=[0.0], token_weights=[1.0], ref_logprobs=[-30.0])
    loss, grad, _ = loss_of([log_p], batch, Objective(kl_coef=1.0))
    assert math.isfinite(loss)
    assert grad == pytest.approx([slope], rel=1e-8)


def test_sequence_ratio_is_the_geometric_mean_of_its_scored_tokens():
    """Sequence 1 has log-ratios 0.1 and 0.3 (a third is masked): s = e^0.2, shared gradient -A*s/2 each."""
    batch = tokens(
        targets=[0] * 4,
        advantages=[1.0, 1.0, torch.nan, 1.0],
        token_weights=[0.5, 0.5, 0.0, 1.0],
        old_logprobs=[-1.0, -1.0, torch.nan, -1.0],
        cu_seqlens=[0, 3, 3, 4],
    )
    loss, grad, metrics = loss_of(
        [-0.9, -0.7, -5.0, -1.0], batch, Objective(ratio_level="sequence", clip_ratio_high=1.0)
    )
    s = math.exp(0.2)
    assert loss == pytest.approx(-s - 1.0)
    assert grad == pytest.approx([-s / 2, -s / 2, 0.0, -1.0])
    assert metrics["ratio_sum"] == pytest.approx(2 * s + 1)
    assert metrics["num_tokens"] == 3


def test_on_policy_ratio_is_one_with_gradient():
    batch = tokens(targets=[0, 0], advantages=[3.0, -1.0], token_weights=[1.0, 1.0])
    loss, grad, metrics = loss_of([-1.0, -9.0], batch, Objective())
    assert loss == pytest.approx(-2.0)
    assert grad == pytest.approx([-3.0, 1.0])
    assert (metrics["ratio_sum"], metrics["old_kl_sum"]) == (2.0, 0.0)


def test_drifted_token_cannot_overflow():
    batch = tokens(targets=[0], advantages=[-1.0], token_weights=[1.0], old_logprobs=[-500.0])
    loss, grad, _ = loss_of([-1.0], batch, Objective())
    assert (loss, grad) == (pytest.approx(math.exp(20.0)), [0.0])


def test_entropy_bonus_lowers_the_loss():
    batch = tokens(targets=[0], advantages=[0.0], token_weights=[0.5])
    loss, _, metrics = loss_of([-1.0], batch, Objective(entropy_coef=0.1), entropy=[2.0])
    assert (loss, metrics["entropy_sum"]) == (pytest.approx(-0.1), 2.0)


def test_masked_tokens_may_hold_anything():
    nan = torch.nan
    logits = torch.tensor([[0.0, 1.0], [nan, nan]], dtype=torch.float64, requires_grad=True)
    batch = tokens(
        targets=[1, -7],
        advantages=[1.0, nan],
        token_weights=[1.0, 0.0],
        old_logprobs=[-1.0, nan],
        ref_logprobs=[-1.0, nan],
        importance_weights=[1.0, nan],
    )
    out = reference.policy_loss(logits, batch, Objective(kl_coef=0.1, entropy_coef=0.1))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert logits.grad[1].tolist() == [0.0, 0.0]
    assert (out.logprobs[1].item(), out.entropy[1].item()) == (0.0, 0.0)
    assert all(math.isfinite(value) for value in out.metrics.values())
    assert out.metrics["num_tokens"] == 1


def test_target_outside_the_vocabulary_is_refused():
    batch = tokens(targets=[0, 2], advantages=[1.0, 1.0], token_weights=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"targets\[1\]=2 is outside \[0, 2\)"):
        reference.policy_loss(torch.zeros(2, 2), batch, Objective())


def test_segment_attention_literal():
    """With q = 0 a row is the mean of what it sees: prompt [0, 2), completions [2, 3) and [3, 5), of one key head."""
    segments = torch.tensor([[0, 2, 0, 0], [2, 3, 0, 2], [3, 5, 0, 2]])
    v = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64).view(5, 1, 1)
    out = reference.segment_attention(torch.zeros(5, 2, 1).double(), v, v, segments, scale=1.0)
    for head in range(2):
        assert out[:, head, 0].tolist() == pytest.approx([1.0, 3 / 2, 7 / 3, 11 / 3, 27 / 4])


def test_segment_attention_scales_the_scores():
    """Row 1 sees keys 0 and 1 with scores 0 and 2 * 0.5: weights 1 / (1 + e) and e / (1 + e)."""
    segments, v = torch.tensor([[0, 2, 0, 0]]), torch.tensor([0.0, 1.0]).view(2, 1, 1)
    out = reference.segment_attention(torch.full((2, 1, 1), 2.0), v, v, segments, scale=0.5)
    assert out.flatten().tolist() == pytest.approx([0.0, math.e / (1 + math.e)])


SURROGATES = [
    Objective(surrogate=s, ratio_level=level)
    for s, level in itertools.product(("clip", "sapo", "reinforce"), ("token", "sequence"))
]


@pytest.mark.parametrize("objective", SURROGATES, ids=lambda o: f"{o.surrogate}-{o.ratio_level}")
def test_gradcheck(objective):
    """cispo and on-policy ratios are stop-gradients by definition, so finite differences cannot see them."""
    torch.manual_seed(0)
    settings = {k: getattr(objective, k) for k in ("surrogate", "ratio_level")}
    objective = Objective(**settings, kl_coef=0.1, kl_times_ratio=True, entropy_coef=0.05, temperature=0.7)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 5, (6,))
    log_p = reference.logprobs(logits.detach(), targets, temperature=0.7)
    batch = LossInputs(
        targets=targets,
        advantages=torch.randn(6).double(),
        token_weights=torch.tensor([0.3, 0.2, 0.0, 0.7, 0.1, 0.4]).double(),
        old_logprobs=log_p + 0.3 * torch.randn(6),
        ref_logprobs=log_p + 0.3 * torch.randn(6),
        importance_weights=torch.rand(6).double(),
        cu_seqlens=torch.tensor([0, 3, 6]),
    )
    assert torch.autograd.gradcheck(lambda x: reference.policy_loss(x, batch, objective).loss, logits)


def test_a_surrogate_of_ones_own():
    """Literal: two sequences of 2 and 1 tokens, value -A * mean over the sequence of rho, w = 1/4, 1/4, 1/2."""
    batch = LossInputs(
        targets=torch.zeros(3, dtype=torch.int64),
        advantages=torch.tensor([1.0, 1.0, -2.0]),
        token_weights=torch.tensor([0.25, 0.25, 0.5]),
        old_logprobs=torch.tensor([-1.0, -2.0, -3.0]),
        cu_seqlens=torch.tensor([0, 2, 3]),
    )

    def mean_ratio(x):
        assert x.sequences.lengths.tolist() == [2, 2, 1]
        assert x.sequences.sum(x.advantages).tolist() == [2.0, 2.0, -2.0]
        return -x.advantages * x.sequences.mean(x.ratio), {"above": x.ratio > 1.5}

    surrogate = CustomSurrogate(name="mean", function=mean_ratio, asks=frozenset({"sequences"}), metrics=("above",))
    log_p = [-1.0 + math.log(2.0), -2.0, -3.0 + math.log(3.0)]
    loss, grad, metrics = loss_of(log_p, batch, Objective(surrogate=surrogate))
    assert loss == pytest.approx(-0.5 * 1.5 + 0.5 * 2 * 3)
    assert grad == pytest.approx([-0.5, -0.25, 3.0])  # each of two tokens: 2 * 1/4 * rho / 2
    assert (metrics["surrogate/above"], metrics["ratio_sum"]) == (2.0, pytest.approx(6.0))
