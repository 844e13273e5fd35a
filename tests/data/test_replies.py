"""An environment's words as tokens: exactly what the chat template would have put there."""

from unittest.mock import patch

import pytest
from builders import byte_tokenizer

from fastgrpo.config import DataConfig, UserError
from fastgrpo.data.replies import ReplyEncoder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think is defined %}<think>\n{% endif %}{% endif %}"
)
# As Qwen3's does, it writes an empty thought before the assistant's last message alone.
THINKING = CHATML.replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
ENDS_OTHERWISE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
TALK = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "Let me ask."}]


def encoder(config, tokenizer, vocab_size=260):
    return ReplyEncoder(config, tokenizer, vocab_size=vocab_size)


def chat_tokenizer(template):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, THINKING], ids=["chatml", "thinking"])
@pytest.mark.parametrize("reply", [[("tool", "5")], [("tool", "5"), ("tool", "é\n")], [("user", "Sure?")]], ids=str)
def test_prompt_turn_and_reply_are_the_whole_conversations_tokens(template, reply):
    tokenizer = chat_tokenizer(template)
    messages = [{"role": role, "content": content} for role, content in reply]
    whole = tokenizer.apply_chat_template([*TALK, *messages], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    turn = [*ids(TALK[1]["content"]), tokenizer.eos_token_id]
    encoded = encoder(DataConfig(), tokenizer)(messages, turn[-1], "here")
    assert [*ids(prompt), *turn, *encoded.tolist()] == ids(whole)


def test_the_templates_end_of_a_turn_stays_where_the_policy_ended_otherwise():
    tokenizer = chat_tokenizer(CHATML)
    encode = encoder(DataConfig(), tokenizer)
    with_end, without = (encode([{"role": "user", "content": "?"}], last, "here").tolist() for last in (5, 259))
    assert tokenizer.convert_ids_to_tokens(259) == "<|im_end|>"
    assert with_end == [259, *without]
    plain = encoder(DataConfig(), chat_tokenizer(ENDS_OTHERWISE))([{"role": "user", "content": "?"}], 259, "here")
    assert tokenizer.decode(plain) == "\n[user] ?\n[assistant]"


def test_the_templates_own_settings_reach_it():
    config = DataConfig(chat_template_kwargs={"think": True})
    encoded = encoder(config, chat_tokenizer(CHATML))([{"role": "tool", "content": "5"}], 259, "here")
    assert chat_tokenizer(CHATML).decode(encoded).endswith("<|im_start|>assistant\n<think>\n")


def test_the_next_reply_is_encoded_in_one_go():
    tokenizer = chat_tokenizer(CHATML)
    kind, encode = type(tokenizer), encoder(DataConfig(), tokenizer)
    encode([{"role": "tool", "content": "0123456789"}], 259, "here")
    with patch.object(kind, "__call__", autospec=True, side_effect=kind.__call__) as called:
        encode([{"role": "tool", "content": "9876543210"}], 259, "here")
    assert called.call_count == 1  # not once a character, to find those that the tokenizer lacks


@pytest.mark.parametrize("config", [DataConfig(), DataConfig(chat_template=False)])
def test_without_a_template_the_contents_alone_are_read(config):
    tokenizer = chat_tokenizer(CHATML) if not config.chat_template else byte_tokenizer()
    encode = encoder(config, tokenizer)
    encoded = encode([{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}], 1, "here")
    assert tokenizer.decode(encoded) == "ab"
    with pytest.raises(UserError, match="here: the tokenizer makes no token of ''"):
        encode([{"role": "tool", "content": ""}], 1, "here")


def test_a_template_that_refuses_says_so():
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + (
        "{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"here: the chat template refuses it \(.*no tools\)"):
        encoder(DataConfig(), chat_tokenizer(template))([{"role": "tool", "content": "5"}], 1, "here")
    passes_over = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    encode = encoder(DataConfig(), chat_tokenizer(passes_over))
    encode([{"role": "user", "content": "5"}], 1, "here")
    with pytest.raises(UserError, match="here: the chat template leaves out a message of role tool; give it another"):
        encode([{"role": "user", "content": "5"}, {"role": "tool", "content": "5"}], 1, "here")
    forgets = "{{ messages[-1].content }}"
    with pytest.raises(UserError, match="the chat template leaves out what the assistant said before"):
        encoder(DataConfig(), chat_tokenizer(forgets))([{"role": "tool", "content": "5"}], 1, "here")


def test_a_token_that_the_model_does_not_have_is_refused():
    encode = encoder(DataConfig(), chat_tokenizer(CHATML), vocab_size=259)
    with pytest.raises(UserError, match="here: its token 259 is none of the model's 0 to 258; change it"):
        encode([{"role": "user", "content": "?"}], 5, "here")
