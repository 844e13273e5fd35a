"""Everything that can be wrong with the data, as one line that names the place and how to mend it."""

import re
import sys
import types

import pyarrow
import pytest
from pyarrow import parquet

from fastgrpo.config import DataConfig, UserError
from fastgrpo.data import load_prompts

ROW = {"question": "a", "answer": "b"}


def load(tokenizer, path, limit=1000, **changes):
    config = DataConfig(**{"source": "jsonl", "path": path, "eval_size": 0, **changes})
    return load_prompts(config, tokenizer, seed=0, max_prompt_tokens=limit)


def error_of(*args, **changes):
    with pytest.raises(UserError) as error:
        load(*args, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "csv"}, "data.source=csv is unknown; use one of jsonl, parquet, hub, arithmetic"),
        (
            {"source": "arithmetic", "path": "x"},
            "data.path=x is not read by data.source=arithmetic; set data=jsonl, parquet or hub",
        ),
        (
            {"source": "arithmetic", "path": None, "operation": "division"},
            "data.operation=division is unknown; use addition or subtraction",
        ),
        ({"path": None}, "data.path is not set, which data.source=jsonl reads; set it or use data=arithmetic"),
        (
            {"source": "hub", "eval_path": "y"},
            "data.eval_path=y is not read by data.source=hub; use data.eval_split",
        ),
        ({"source": "hub", "path": ["x", "y"]}, "data.path=[x,y]: data.source=hub reads one data set; name one"),
        ({"eval_split": "test"}, "data.eval_split=test is only read by data.source=hub; use data.eval_path"),
        ({"long_prompts": "cut"}, "data.long_prompts=cut is unknown; use fail or drop"),
        ({"prompt_template": "Q:"}, "data.prompt_template='Q:' must hold {prompt} once"),
    ],
)
def test_wrong_settings(tokenizer, changes, message):
    assert error_of(tokenizer, **{"path": "x", **changes}) == message


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_missing_file(tokenizer, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    there = f"does not exist (looked in {tmp_path}); correct the path"
    assert error_of(tokenizer, "no.jsonl", source=source) == f"data.path=no.jsonl {there}"
    there = "holds no .jsonl or .parquet file; name a directory that does, or the files"
    assert error_of(tokenizer, ".", source=source) == f"data.path=. {there}"


def test_names_of_several_files(tokenizer, jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl([ROW], "train-0.jsonl")
    jsonl([ROW], "tests.jsonl")
    assert error_of(tokenizer, "dev-*.jsonl") == (
        f"data.path=dev-*.jsonl matches no file (looked in {tmp_path}); correct the pattern"
    )
    assert error_of(tokenizer, ["train-0.jsonl", "nope.parquet"]).startswith("data.path=nope.parquet does not exist")
    assert error_of(tokenizer, ["train-0.jsonl", "./train*"]) == (
        "data.path=[train-0.jsonl,./train*] names train-0.jsonl twice; name it once"
    )
    assert len(load(tokenizer, ".").train) == 2
    jsonl([ROW], "test.jsonl")
    assert error_of(tokenizer, ["tests.jsonl", "."]) == (
        "data.path=. holds the files of several splits; name those of one: 'test*' or 'train*'"
    )


@pytest.mark.parametrize("value", [3, True, {"a": "b"}, "", " ", [], ["a.jsonl", 3], ["a.jsonl", ["b.jsonl"]]])
@pytest.mark.parametrize("key", ["path", "eval_path"])
def test_what_names_no_file(tokenizer, jsonl, key, value):
    paths = {"path": jsonl([ROW]), "eval_path": None} | {key: value}
    message = error_of(tokenizer, **paths)
    assert re.fullmatch(rf"data\.{key}=.*: give a file, a directory, a pattern .*, or a list of these: \[.*\]", message)


def test_missing_eval_file(tokenizer, jsonl):
    message = error_of(tokenizer, jsonl([ROW]), eval_path="/no/such.jsonl")
    assert message.startswith("data.eval_path=/no/such.jsonl does not exist")


def test_empty_file(tokenizer, jsonl):
    path = jsonl("\n \n")
    assert error_of(tokenizer, path) == f"data.path={path} has no rows; give a file with at least one"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "a", "answer"', "is not JSON (Expecting ':' delimiter, column 27); mend or remove the line"),
        (b"[1]", "holds a list, not an object; write it as {column: value, ...}"),
        (b'{"question": "\xff"}', "is not UTF-8 (byte 14); save the file as UTF-8"),
    ],
)
def test_broken_line(tokenizer, tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"question": "a", "answer": 1}\n\n' + line + b"\n")
    assert error_of(tokenizer, str(file)) == f"{file} line 3 {message}"


def test_not_parquet(tokenizer, jsonl, tmp_path):
    damaged = tmp_path / "damaged.parquet"
    parquet.write_table(pyarrow.table({"question": ["a" * 100] * 100}), damaged)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:4] + bytes(60) + whole[64:])
    for path in (jsonl([ROW], "lines.parquet"), jsonl([ROW], "lines.data"), str(damaged)):
        message = error_of(tokenizer, path, source="parquet")
        assert re.fullmatch(
            rf"data\.path={re.escape(path)} cannot be read as Parquet \(.+\); restore it, or name JSON Lines .jsonl",
            message,
        )


def test_missing_columns(tokenizer, jsonl):
    path = jsonl([ROW, {"question": "c", "level": 3}])
    assert error_of(tokenizer, path, prompt_column="prompt") == (
        f"{path} line 1 has no column 'prompt' (data.prompt_column); its columns are question, answer"
    )
    assert error_of(tokenizer, path) == (
        f"{path} line 2 has no column 'answer' (data.answer_column); its columns are question, level; "
        "data.answer_column=null is for data without answers"
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, "is 7; give a text or a list of messages"),
        (None, "is None; give a text or a list of messages"),
        ("  ", "is empty; give a prompt or remove the row"),
        ([], "is an empty list of messages; give a prompt or remove the row"),
        (["hello"], ", message 0 is 'hello'; give {role: ..., content: ...}"),
        ([{"role": "user"}], ", message 0 is {'role': 'user'}; give {role: ..., content: ...}"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "ends with the assistant's message; the last one must be what it answers to",
        ),
        (
            [{"role": "user", "content": None}],
            ", message 0: its content is None, and models here read text alone; give a text",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
            ", message 0: its content is [{'type': 'text', 'text': 'a'}, {'type': 'image'}], and models here read text "
            "alone; give a text",
        ),
        (
            [{"role": "user", "content": "a"}],
            "holds chat messages, which a tokenizer without a chat template cannot use; give texts",
        ),
    ],
)
def test_prompts_that_are_none(tokenizer, jsonl, prompt, message):
    path = jsonl([ROW, {"question": prompt, "answer": 1}])
    space = "" if message.startswith(",") else " "
    assert error_of(tokenizer, path) == f"{path} line 2, column 'question'{space}{message}"


def test_chat_settings_that_contradict(tokenizer, tokenizer_like, chat_template, jsonl):
    path = jsonl([ROW])
    mend = "put it into data.prompt_template instead"
    assert error_of(tokenizer, path, system_prompt="x") == (
        f"data.system_prompt: a tokenizer without a chat template cannot use it; {mend}"
    )
    chat = tokenizer_like(chat_template=chat_template)
    assert error_of(chat, path, system_prompt="x", chat_template=False) == (
        f"data.system_prompt: data.chat_template=false cannot use it; {mend}"
    )
    messages = jsonl(
        [{"question": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "answer": 1}]
    )
    where = f"{messages} line 1, column 'question'"
    assert error_of(chat, messages, system_prompt="x") == (
        f"{where} has a system message of its own; remove data.system_prompt"
    )
    assert error_of(chat, messages, prompt_template="Q: {prompt}") == (
        f"{where} holds chat messages, which data.prompt_template cannot wrap; remove it"
    )


def test_a_template_that_refuses(tokenizer_like, jsonl):
    chat = tokenizer_like(chat_template="{{ raise_exception('no system role') }}")
    path = jsonl([ROW])
    assert error_of(chat, path) == (
        f"{path} line 1, column 'question': the chat template refuses it (TemplateError: no system role); "
        "change the messages"
    )


def test_too_long(tokenizer, jsonl):
    path = jsonl([ROW, {"question": "abcdef", "answer": 1}])
    message = (
        f"prompt train/1 ({path} line 2) has 6 tokens, more than the 5 that fit; raise data.max_prompt_tokens "
        "(or lower sampling.max_new_tokens), or set data.long_prompts=drop"
    )
    assert error_of(tokenizer, path, limit=5) == message
    assert error_of(tokenizer, path, max_prompt_tokens=5) == message
    assert error_of(tokenizer, path, limit=0, long_prompts="drop") == (
        "data.long_prompts=drop left no training prompt within 0 tokens; raise the limit"
    )


def test_nothing_left_to_train_on(tokenizer, jsonl):
    path = jsonl([ROW, ROW, {"question": "c", "answer": 1}])
    assert error_of(tokenizer, path, eval_size=2) == (
        f"data.eval_size=2 leaves nothing to train on: {path} has 2 different prompts; lower it or give data.eval_path"
    )
    assert error_of(tokenizer, path, eval_path=path) == (
        "every training prompt is among the held-out ones; give data.path prompts of its own"
    )


@pytest.mark.parametrize("unk", ["none", "declared", "inner"])
def test_characters_that_the_tokenizer_does_not_know(tokenizer_like, jsonl, unk):
    path = jsonl([ROW, {"question": "1 é+×", "answer": 1}])
    assert error_of(tokenizer_like(unk=unk), path) == (
        f"{path} line 2: the tokenizer cannot encode '×', 'é'; remove it or use a tokenizer that knows it"
    )
    space = jsonl([{"question": "1 2", "answer": 1}])
    assert "cannot encode ' '" in error_of(tokenizer_like(characters="12", unk=unk), space)


def test_words_whose_letters_are_unknown_alone_are_fine(jsonl, word_tokenizer):
    assert load(word_tokenizer, jsonl([{"question": "two plus two", "answer": 4}])).train[0].token_ids.tolist() == [
        1,
        2,
        1,
    ]
    path = jsonl([{"question": "two minus two", "answer": 4}])
    assert error_of(word_tokenizer, path).startswith(f"{path} line 1: the tokenizer cannot encode 'i', 'm', 'n'")


def test_characters_that_vanish(jsonl, byte_pair_tokenizer):
    path = jsonl([{"question": "abab", "answer": 4}, {"question": "abzab", "answer": 4}])
    assert error_of(byte_pair_tokenizer, path).startswith(f"{path} line 2: the tokenizer cannot encode 'z'")


def test_an_end_token_behind_the_prompt(tokenizer_like, jsonl):
    assert error_of(tokenizer_like(eos_behind=True), jsonl([ROW])) == (
        "the tokenizer puts its end token behind every prompt, so that the model has nothing to answer; "
        "set add_eos_token to false in its tokenizer_config.json"
    )


def test_the_hub_without_its_package(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of(tokenizer, "openai/gsm8k", source="hub") == (
        "data.source=hub needs the datasets package: pip install fastgrpo[hub]"
    )


def test_a_data_set_that_the_hub_does_not_give(monkeypatch, tokenizer):
    def load_dataset(name, config, split):
        raise ValueError(f"Unknown split {split!r}.\nBad")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert error_of(tokenizer, "openai/gsm8k", source="hub", hub_config="main", split="dev") == (
        "data.path=openai/gsm8k/main split dev cannot be loaded (ValueError: Unknown split 'dev'. Bad); "
        "check hub_config and split"
    )


def test_half_a_character_is_refused(tokenizer, jsonl):
    path = jsonl('{"question": "\\ud800", "answer": "b"}\n{"question": "a", "answer": "b"}\n')
    assert error_of(tokenizer, path, eval_size=1).startswith(f"{path} line 1: the tokenizer cannot encode '\\ud800'")


def test_a_line_nested_too_deeply_is_refused(tokenizer, jsonl):
    path = jsonl("[" * 100_000)
    assert error_of(tokenizer, path) == f"{path} line 1 is nested too deeply to read; remove the line"
