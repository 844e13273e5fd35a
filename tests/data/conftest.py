"""Small tokenizers made on the spot."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
CHAT = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{% if shout is defined %}!{% endif %}"
)


def make_tokenizer(characters=CHARACTERS, unk="none", bos=None, eos_behind=False, chat_template=None):
    """One token a character, after <s> 0 and </s> 1. unk: none, declared, or known to the inner model only."""
    unknown = [] if unk == "none" else ["<unk>"]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *unknown, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    before, behind = (f"{bos} " if bos else ""), (" </s>" if eos_behind else "")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{behind}", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if unk == "declared":
        fast.unk_token = "<unk>"
    fast.chat_template = chat_template
    return fast


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def tokenizer_like():
    return make_tokenizer


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows, or raw text, and returns the path."""

    def write(rows, name="data.jsonl"):
        file = tmp_path / name
        file.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


@pytest.fixture
def chat_template():
    return CHAT


@pytest.fixture
def word_tokenizer():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "two": 1, "plus": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.fixture
def byte_pair_tokenizer():
    """Knows a, b and ab; drops everything else without a word."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])))
