"""The experts that the real vLLM tells, against a full forward pass of transformers."""

from setting import prompts


def test_every_token_but_the_last_comes_with_the_experts_of_a_full_forward_pass(experts):
    assert experts["different"] == 0
    assert experts["shapes"] == [[len(prompt.token_ids), 2, 2] for prompt in prompts(5)]
    assert experts["dtypes"] == ["torch.uint8"]


def test_they_are_kept_only_where_asked_for(experts):
    assert experts["unasked"]
