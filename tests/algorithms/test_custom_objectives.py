"""Surrogates and advantages of the user's own: what they are given, what they may return, and what docs show."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import make_groups

from fastgrpo.algorithms.advantages import comparison
from fastgrpo.algorithms.objective import needs_reference, objective_of
from fastgrpo.config import AlgorithmConfig, UserError
from fastgrpo.kernels.custom_terms import custom_terms
from fastgrpo.kernels.objective import LossInputs
from fastgrpo.types import Prompt

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "example_objectives.py"
DOCS = HERE.parent.parent / "docs" / "objective.md"
PROMPT = Prompt(prompt_id="train/0", token_ids=torch.tensor([1]), text="1+1=", answer="2")


def objective_with(name, path=EXAMPLES, **settings):
    return objective_of(AlgorithmConfig(surrogate=f"{path}:{name}", **settings), temperature=1.0)


def test_a_surrogate_tells_what_it_needs_and_reports():
    objective = objective_with("clip", kl_coef=0.0, surrogate_kwargs={"width": 0.1})
    assert objective.custom.metrics == ("clipped",)
    assert objective.needs_reference
    assert not objective.relates_tokens
    assert needs_reference(AlgorithmConfig(surrogate=f"{EXAMPLES}:clip", kl_coef=0.0))
    assert not needs_reference(AlgorithmConfig(surrogate=f"{EXAMPLES}:mixes", kl_coef=0.0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixes", "a token's value depends on which others are computed beside it.*ask for `sequences`"),
        ("mixes_sequences", "depends on which others.*take means and sums with `sequences`"),
        ("detached", "nothing is learned from it; compute it from `logprobs` or `ratio`, undetached"),
        ("infinite", "is not finite for common logprobs and advantages"),
        ("infinite_where_certain", "is not finite for common logprobs and advantages"),
        ("infinite_where_all_are_equal", "is not finite for common logprobs and advantages"),
        ("infinite_on_policy", "is not finite for a policy that equals the old one"),
        ("random", "its value is another at every call; draw nothing at random and keep no state"),
        ("alternates", "reports `(odd|even)` where it has reported `(odd|even)`; report the same at every call"),
        ("oddly_named", "reports '50%'; name it with letters, digits, spaces"),
        ("one_number", r"its value is \(\); return \(16,\), one a token"),
        ("pair_of_tensors", "returned a pair whose second is no dictionary"),
        ("raises", r"raised RuntimeError: no luck \(example_objectives.py line \d+\); mend the function"),
        ("waits", "is async; write a plain function"),
        ("asks_for_more", "asks for `discount`, which is none of.*set algorithm.surrogate_kwargs.discount"),
        ("missing", "has no 'missing'; it has clip"),
    ],
)
def test_a_surrogate_that_breaks_its_contract_is_refused(name, message):
    with pytest.raises(UserError, match=f"^algorithm.surrogate={EXAMPLES}:{name}.*{message}"):
        objective_with(name)


def test_a_mask_may_leave_nothing_but_what_agrees():
    assert objective_with("only_where_agreed").relates_tokens


def test_a_surrogate_may_write_into_what_it_is_given():
    """On-policy, where old_logprobs are the policy's own and the ratio is 1."""
    objective, lp = objective_with("writes"), torch.tensor([-1.0, -2.0])
    batch = LossInputs(targets=torch.zeros(2).long(), advantages=torch.tensor([1.0, 3.0]), token_weights=torch.ones(2))
    terms = custom_terms(lp, None, batch, objective, batch.token_weights)
    assert (terms.value.tolist(), terms.grad_logprob.tolist()) == ([2.0, 12.0], [-2.0, -6.0])
    assert (terms.ratio.tolist(), batch.advantages.tolist()) == ([1.0, 1.0], [1.0, 3.0])


def test_an_argument_that_no_parameter_takes_is_refused():
    with pytest.raises(UserError, match=r"^algorithm.surrogate_kwargs.depth: .*clip has no parameter of that name"):
        objective_with("clip", surrogate_kwargs={"depth": 1})


def test_advantages_of_ones_own():
    compare = comparison(AlgorithmConfig(advantage=f"{EXAMPLES}:standardised"))
    groups = [replace(g, advantages=None) for g in make_groups([(3, [2, 5]), (3, [1, 1])])]
    groups = [replace(g, rewards=torch.tensor(r)) for g, r in zip(groups, ([1.0, 0.0], [0.5, 0.5]), strict=True)]
    first, second = compare(groups)
    assert [a.shape for a in first.advantages] == [(2,), (5,)]
    torch.testing.assert_close(
        torch.cat(first.advantages), torch.tensor([0.7071] * 2 + [-0.7071] * 5), atol=1e-4, rtol=0
    )
    assert torch.cat(second.advantages).tolist() == [0.0, 0.0]
    assert compare([]) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", r"on prompt train/0 returned \(1,\) for 4 completions; return one number a completion, or"),
        ("nothing", "on prompt train/0 returned a NoneType; return one number a completion"),
        ("without_care_for_equal_ones", "on prompt train/0 returned an advantage that is not finite"),
        ("not_finite", "on prompt train/0 returned an advantage that is not finite"),
        ("shaken", "depends on chance or on earlier calls; make it a function of what it is given"),
    ],
)
def test_advantages_that_are_none_are_refused(name, message):
    compare = comparison(AlgorithmConfig(advantage=f"{EXAMPLES}:{name}"))
    with pytest.raises(UserError, match=f"^algorithm.advantage={EXAMPLES}:{name} {message}"):
        compare.check(PROMPT, ["exact_match"], 4)


def test_what_docs_show_runs(tmp_path):
    (block,) = re.findall(r"```python\n(# my_objective.py.*?)```", DOCS.read_text(), re.DOTALL)
    path = tmp_path / "my_objective.py"
    path.write_text(block)
    assert objective_with("soft_clip", path, surrogate_kwargs={"steepness": 3.0}).custom.metrics == ()
    assert objective_with("geometric_mean", path).relates_tokens
    assert objective_with("skip_stale", path).custom.metrics == ("skipped",)
    assert objective_with("distill", path, kl_coef=0.0).needs_reference
    kwargs = {"weights": {"exact": 1.0, "brevity": 0.5}}
    compare = comparison(AlgorithmConfig(advantage=f"{path}:decoupled", advantage_kwargs=kwargs))
    compare.check(PROMPT, ["exact", "brevity"], 4)
    (group,) = make_groups([(3, [2, 2])])
    terms = {"exact": torch.tensor([1.0, 0.0]), "brevity": torch.tensor([3.0, 3.0])}
    (group,) = compare([replace(group, rewards=terms["exact"], reward_terms=terms, advantages=None)])
    assert group.advantages.tolist() == pytest.approx([0.7071, -0.7071], abs=1e-4)
