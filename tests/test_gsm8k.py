"""Two steps on the real GSM8K with a small random Qwen2, from JSON lines and from Parquet."""

import json
import sys
from pathlib import Path

import pytest
from builders import save_tiny_model

from fastgrpo.main import main
from fastgrpo.metrics import read_jsonl
from fastgrpo.rewards.verifiable import gsm8k

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
pytestmark = pytest.mark.skipif(not GSM8K.is_dir(), reason=f"GSM8K is not in {GSM8K}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One token a byte: the longest question has 985."""
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), max_length=2048)


def train(monkeypatch, *arguments: str) -> list[dict]:
    small = ["run.dir=run", "run.trackers=[]", "train.num_steps=2", "train.prompts_per_step=4", "eval.num_prompts=4"]
    small += ["algorithm.group_size=4", "sampling.max_new_tokens=12", "train.learning_rate=1e-3"]
    monkeypatch.setattr(sys, "argv", ["fastgrpo", "train", *arguments, *small])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # main sets it
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    return read_jsonl("run/metrics.jsonl")


def rows_of_gsm8k() -> list[dict]:
    return [json.loads(line) for line in (GSM8K / "train.jsonl").read_text().splitlines()]


def test_two_steps_on_the_training_set(workplace, model, monkeypatch, capsys):
    rows = train(monkeypatch, f"model.path={model}", f"data.path={GSM8K / 'train.jsonl'}", "reward=gsm8k")
    assert "7217 prompts to train on, 256 held out" in capsys.readouterr().out
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[-1]["policy_version"] == 2
    assert rows[-1]["reward/error_count"] == 0  # every reference answer has its number
    assert 0.0 <= rows[0]["eval/accuracy"] <= 1.0
    texts = {row["question"]: row["answer"] for row in rows_of_gsm8k()}
    for sample in read_jsonl("run/samples.jsonl"):
        assert texts[sample["prompt"]] == sample["answer"]
        assert sample["reward"] == gsm8k(sample["completion"], sample["answer"])


def test_two_steps_on_parquet_with_the_test_set_held_out(workplace, model, monkeypatch, capsys):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(rows_of_gsm8k()[:40])
    for number in range(2):
        parquet.write_table(table.slice(20 * number, 20), f"train-{number}.parquet")
    parquet.write_table(table.slice(30), "eval.parquet")
    files = ["data.path=train-*.parquet", "data.eval_path=[eval.parquet]"]
    wrapped = "data.prompt_template='Question: {prompt}\nAnswer: '"
    rows = train(monkeypatch, f"model.path={model}", *files, "reward=gsm8k", wrapped)
    out = capsys.readouterr().out
    assert "30 prompts of 2 files to train on, 10 held out, 10 repeat a held-out one and are left out" in out
    assert rows[-1]["policy_version"] == 2
    assert "\n  eval_path:\n  - eval.parquet\n" in Path("run/config.yaml").read_text()
    prompts = {sample["prompt"] for sample in read_jsonl("run/samples.jsonl") if sample["kind"] == "train"}
    assert all(prompt.startswith("Question: ") and prompt.endswith("\nAnswer: ") for prompt in prompts)


def test_the_experiment_runs_as_the_readme_writes_it(workplace, model, monkeypatch):
    lines = (GSM8K / "train.jsonl").read_text().splitlines(keepends=True)
    Path("head.jsonl").write_text("".join(lines[:300]))  # 256 are held out
    rows = train(monkeypatch, "experiment=gsm8k", f"model.path={model}", "data.path=head.jsonl")
    assert rows[-1]["policy_version"] == 2
    sample = read_jsonl("run/samples.jsonl")[0]
    assert sample["prompt"].endswith("\nThink step by step and put the final number after ####.")
