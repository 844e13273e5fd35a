"""From files to prompts: ids, metadata, what is held out, templates, lengths."""

import gc
import json
import sys
import types

import pyarrow
import torch
from pyarrow import parquet

from fastgrpo.config import DataConfig
from fastgrpo.data import ALPHABET, load_prompts, prompts


def load(tokenizer, path, *, seed=0, limit=1000, **changes):
    config = DataConfig(**{"source": "jsonl", "path": path, "eval_size": 0, **changes})
    return load_prompts(config, tokenizer, seed=seed, max_prompt_tokens=limit)


def questions(n):
    return [{"question": f"What is {i}?", "answer": i} for i in range(n)]


def test_a_row_becomes_a_prompt(jsonl, tokenizer):
    row = '{"question": "a b", "answer": {"x": 1}, "level": 3, "tags": ["t"]}'
    path = jsonl(f'\ufeff{row}\n\n{{"question": "c", "answer": 2}}')
    first, second = load(tokenizer, path).train
    assert (first.prompt_id, first.text, first.answer, first.metadata) == (
        "train/0",
        "a b",
        {"x": 1},
        {"question": "a b", "level": 3, "tags": ["t"]},
    )
    assert first.token_ids.dtype == torch.int64
    assert tokenizer.decode(first.token_ids) == "a b"
    assert (second.prompt_id, second.text, second.answer, second.metadata) == (
        "train/1",
        "c",
        2,
        {"question": "c"},
    )


def test_columns_are_the_configurations(jsonl, tokenizer):
    path = jsonl([{"q": "one", "answer": "kept"}])
    (prompt,) = load(tokenizer, path, prompt_column="q", answer_column=None, prompt_template="{prompt} {x}").train
    assert (prompt.text, prompt.answer, prompt.metadata) == ("one {x}", None, {"q": "one", "answer": "kept"})


def test_parquet_is_read_like_jsonl(jsonl, tmp_path, tokenizer):
    rows = [{**row, "parts": [{"n": row["answer"]}]} for row in questions(5)]
    file = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    from_parquet = load(tokenizer, str(file), source="parquet", eval_size=2)
    from_jsonl = load(tokenizer, jsonl(rows), eval_size=2)
    for ours, theirs in ((from_parquet.train, from_jsonl.train), (from_parquet.eval, from_jsonl.eval)):
        assert [(p.prompt_id, p.text, p.answer, p.metadata) for p in ours] == [
            (p.prompt_id, p.text, p.answer, p.metadata) for p in theirs
        ]


def test_several_files_are_one_set(jsonl, tmp_path, tokenizer):
    rows = questions(12)
    whole = load(tokenizer, jsonl(rows, "whole.jsonl"), eval_path=jsonl(rows[1:3], "held-out.jsonl"))
    shards = tmp_path / "shards"
    shards.mkdir()
    parts = [jsonl(rows[:5], "shards/a-0.jsonl"), str(shards / "a-1.parquet"), jsonl(rows[8:], "shards/a-2.txt")]
    parquet.write_table(pyarrow.Table.from_pylist(rows[5:8]), parts[1])
    held_out = [jsonl(rows[1:2], "b.jsonl"), jsonl(rows[2:3], "c.jsonl")]

    def seen(prompt_set):
        return [(p.prompt_id, p.text, p.answer) for p in prompt_set]

    for path in (parts, f"{shards}/a-*", [f"{shards}/a-[01].*", parts[2]], [str(shards), parts[2]]):
        sets = load(tokenizer, path, eval_path=held_out)
        assert (seen(sets.train), seen(sets.eval)) == (seen(whole.train), seen(whole.eval))
        assert sets.num_files == 3
    assert [p.answer for p in load(tokenizer, parts[::-1]).train] == [8, 9, 10, 11, 5, 6, 7, 0, 1, 2, 3, 4]
    assert len(load(tokenizer, str(shards), eval_size=3).train) == 5  # a directory's other files are none of the data


def test_kinds_are_a_prompt_of_each_set_of_columns(jsonl, tokenizer):
    rows = questions(5)
    for number, level in ((1, 3), (2, 4), (4, 5)):
        rows[number] |= {"level": level}
    rows[3] |= {"topic": "sums"}
    held_out = jsonl([{"question": "other?", "answer": 1, "source": "here"}], "held-out.jsonl")
    kinds = load(tokenizer, jsonl(rows[:2], "a.jsonl"), eval_path=held_out).kinds
    assert [prompt.prompt_id for prompt in kinds] == ["train/0", "train/1", "eval/0"]
    kinds = load(tokenizer, [jsonl(rows[:3], "a.jsonl"), jsonl(rows[3:], "b.jsonl")], eval_path=held_out).kinds
    assert [prompt.prompt_id for prompt in kinds] == ["train/0", "train/1", "train/3", "eval/0"]


def test_the_hub_is_asked_for_splits(monkeypatch, tokenizer):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return questions(3) if split == "train" else [{"question": "What is 1?", "answer": 1}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    sets = load(tokenizer, "openai/gsm8k", source="hub", hub_config="main", eval_split="test")
    assert sorted(asked) == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    assert [p.prompt_id for p in sets.train] == ["train/0", "train/2"]
    assert [p.prompt_id for p in sets.eval] == ["eval/0"]


def test_held_out_rows_are_the_same_for_every_seed_and_order(jsonl, tokenizer):
    rows = questions(40)
    first = load(tokenizer, jsonl(rows), eval_size=8, seed=0)
    assert [p.prompt_id for p in first.eval] == [
        "eval/0",
        "eval/2",
        "eval/3",
        "eval/4",
        "eval/5",
        "eval/9",
        "eval/17",
        "eval/37",
    ]
    assert len(first.train) == 32
    assert {p.answer for p in first.train} | {p.answer for p in first.eval} == set(range(40))
    other = load(tokenizer, jsonl(rows[::-1]), eval_size=8, seed=1)
    assert {p.text for p in other.eval} == {p.text for p in first.eval}
    larger = load(tokenizer, jsonl(rows), eval_size=12, prompt_template="Q: {prompt}")
    assert {p.answer for p in first.eval} < {p.answer for p in larger.eval}


def test_duplicates_of_held_out_prompts_are_not_trained_on(jsonl, tokenizer):
    rows = [{"question": f"{' ' * copy}What is {i}? ", "answer": copy} for copy in range(3) for i in range(6)]
    sets = load(tokenizer, jsonl(rows), eval_size=2)
    held_out = {p.text.strip() for p in sets.eval}
    assert (len(sets.eval), len(held_out)) == (2, 2)
    assert [p.answer for p in sets.eval] == [0, 0]
    assert len(sets.train) == 12
    assert not held_out & {p.text.strip() for p in sets.train}
    assert (sets.num_duplicates, sets.num_dropped) == (4, 0)


def test_an_eval_file_keeps_its_prompts_out_of_training(jsonl, tokenizer):
    eval_path = jsonl([{"question": "What is 3?", "answer": 3}, {"question": "new", "answer": 0}], "eval.jsonl")
    sets = load(tokenizer, jsonl(questions(5)), eval_path=eval_path, eval_size=256)
    assert [p.prompt_id for p in sets.train] == ["train/0", "train/1", "train/2", "train/4"]
    assert [(p.prompt_id, p.text) for p in sets.eval] == [("eval/0", "What is 3?"), ("eval/1", "new")]
    assert sets.num_duplicates == 1


def test_arithmetic_with_a_tokenizer_of_its_alphabet(tokenizer_like):
    tokenizer = tokenizer_like(characters=ALPHABET)
    sets = load(tokenizer, None, source="arithmetic", num_problems=100, eval_size=10, operation="subtraction")
    assert (len(sets.train), len(sets.eval), sets.num_dropped, sets.num_duplicates) == (100, 10, 0, 0)
    prompt = sets.train[3]
    left, right = prompt.text.rstrip("=").split("-")
    assert prompt.prompt_id == "train/3"
    assert prompt.answer == str(int(left) - int(right))
    assert prompt.metadata["solution"].endswith("#" + prompt.answer)
    assert list(prompt.metadata) == ["prompt", "solution"]
    assert tokenizer.decode(tokenizer(prompt.metadata["solution"])["input_ids"]) == prompt.metadata["solution"]


def test_special_tokens_of_plain_text(jsonl, tokenizer_like):
    path = jsonl([{"question": "ab", "answer": 1}])
    for text in ("ab", "<s>ab"):  # as a chat template has written it before
        (prompt,) = load(tokenizer_like(bos="<s>"), jsonl([{"question": text, "answer": 1}], "bos.jsonl")).train
        assert prompt.token_ids.tolist()[0] == 0
        assert len(prompt.token_ids) == 3
    assert len(load(tokenizer_like(), path).train[0].token_ids) == 2


def test_the_chat_template_writes_its_own_special_tokens_once(jsonl, tokenizer_like, chat_template):
    tokenizer = tokenizer_like(bos="<s>", chat_template=chat_template)
    path = jsonl([{"question": "2+2?", "answer": 4}])
    changes = {"system_prompt": "Think.", "prompt_template": "{prompt} Go!", "chat_template_kwargs": {"shout": True}}
    (prompt,) = load(tokenizer, path, **changes).train
    assert prompt.text == "<s>[system]Think.[user]2+2? Go![assistant]!"
    assert prompt.token_ids.tolist().count(0) == 1
    (plain,) = load(tokenizer, path, chat_template=False).train
    assert plain.text == "2+2?"
    assert plain.token_ids.tolist().count(0) == 1


def test_a_prompt_may_be_messages(jsonl, tokenizer_like, chat_template):
    tokenizer = tokenizer_like(chat_template=chat_template)
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "No."},
    ]
    rows = [{"question": messages, "answer": 4}, {"question": messages[:1], "answer": 4}] * 2
    sets = load(tokenizer, jsonl(rows), system_prompt="Think.", eval_size=1)
    texts = {p.text for p in [*sets.train, *sets.eval]}
    assert texts == {
        "<s>[system]Think.[user]2+2?[assistant]5[user]No.[assistant]",
        "<s>[system]Think.[user]2+2?[assistant]",
    }
    assert (len(sets.train), len(sets.eval), sets.num_duplicates) == (2, 1, 1)


def test_messages_are_as_templates_expect_them(tmp_path, tokenizer_like):
    """Parquet gives every message every key, and many templates print parts of text as a Python list."""
    template = "{% for m in messages %}{{ 'call' if 'tool_calls' in m else m.content }};{% endfor %}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    user = {"role": "user", "content": "a"}
    rows = [{"question": [user, call, {"role": "tool", "content": "b"}], "truth": {"answer": 4}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    rows = [{"question": [{"role": "user", "content": [{"type": "text", "text": x} for x in "ab"]}], "answer": 4}]
    (tmp_path / "parts.jsonl").write_text(json.dumps(rows[0]))
    tokenizer = tokenizer_like(chat_template=template)
    parquet_rows = {"source": "parquet", "answer_column": "truth.answer"}
    for name, text, changes in (("rows.parquet", "a;call;b;", parquet_rows), ("parts.jsonl", "ab;", {})):
        (prompt,) = load(tokenizer, str(tmp_path / name), **changes).train
        assert (prompt.text, prompt.answer) == (text, 4)


def test_the_garbage_collector_waits_for_the_rows(jsonl, tokenizer, monkeypatch):
    enabled, encode = [], prompts.encode
    monkeypatch.setattr(prompts, "encode", lambda *args, **how: enabled.append(gc.isenabled()) or encode(*args, **how))
    load(tokenizer, jsonl(questions(2)))
    assert enabled == [False, False]  # training and held-out rows
    assert gc.isenabled()


def test_long_prompts_can_be_dropped_and_are_counted(jsonl, tokenizer):
    path = jsonl([{"question": "x" * n + str(n), "answer": n} for n in range(1, 8)])
    sets = load(tokenizer, path, long_prompts="drop", limit=5)
    assert [p.prompt_id for p in sets.train] == ["train/0", "train/1", "train/2", "train/3"]
    assert sets.num_dropped == 3
    narrower = load(tokenizer, path, long_prompts="drop", limit=5, max_prompt_tokens=3)
    assert (len(narrower.train), narrower.num_dropped) == (2, 5)
