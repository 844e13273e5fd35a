"""The command line: what it prints, what it refuses, and that a mistake is one line and exit code 2."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builders import REWARDS, save_tiny_model, small_run
from hydra.core.singleton import Singleton

from fastgrpo.config import UserError
from fastgrpo.help import all_keys
from fastgrpo.main import main, with_run_dir
from fastgrpo.metrics import read_jsonl
from fastgrpo.models.hf import load_config


@pytest.fixture
def call(workplace, monkeypatch, capsys):
    """fastgrpo as a function: arguments -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # main sets it
    hydra_state = Singleton.get_state()

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastgrpo", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    yield run
    Singleton.set_state(hydra_state)


@pytest.fixture
def refusal(call):
    """The one line that a mistake gets: arguments -> stderr, after checking that nothing was trained."""

    def run(*arguments: str) -> str:
        code, _, err = call(*arguments)
        assert code == 2
        assert err.startswith("fastgrpo: ")
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        assert not Path("run/metrics.jsonl").exists()
        return err.removeprefix("fastgrpo: ").rstrip("\n")

    return run


CONFIGURATION = {
    "unknown key": ("train.learning_rat=1", "train.learning_rat: no such key; did you mean train.learning_rate?"),
    "key of another section": ("group_size=4", "group_size: no such key; did you mean algorithm.group_size?"),
    "hopeless key": ("xyzzy=4", "xyzzy: no such key; `fastgrpo train --help` lists every key"),
    "whole number": ("train.num_steps=many", "train.num_steps=many: wrong type; give a whole number"),
    "fraction": ("train.num_steps=1.5", "train.num_steps=1.5: wrong type; give a whole number"),
    "number": ("train.learning_rate=fast", "train.learning_rate=fast: wrong type; give a number"),
    "truth": ("deterministic=perhaps", "deterministic=perhaps: wrong type; give true or false"),
    "list": ("run.trackers=wandb", "run.trackers=wandb: wrong type; give a list: [wandb]"),
    "value for a section": ("algorithm.reference=ema", "algorithm.reference=ema: wrong type; give"),
    "dashes": (
        "--learning-rate",
        "--learning-rate: no such option; settings are KEY=VALUE, such as train.learning_rate=1e-4",
    ),
    "no value": ("faster", "faster: not understood; write KEY=VALUE"),
    "several values": (
        "algorithm=grpo,dapo",
        "algorithm=grpo,dapo: several values; add --multirun for a run with each, or write a list as KEY=[A,B]",
    ),
    "group choice": (
        "algorithm=ppo",
        "algorithm=ppo: no such choice; use one of cispo, dapo, dr_grpo, grpo, gspo, rloo, sapo",
    ),
    "added key": ("+train.learning_rat=1", "train.learning_rat: no such key; did you mean train.learning_rate?"),
    "key added twice": ("+train.num_steps=1", "+train.num_steps: the key is there already; leave out the +"),
    "choice added": ("+experiment=gsm8k", "+experiment: it is chosen already; leave out the +"),
    "interpolation": ("train.num_steps=${nope}", "train.num_steps: Interpolation key 'nope' not found"),
    "no directory": ("run.dir=", "run.dir=: name a directory"),
    "key of a reward": ("reward.extra.a.wait=1", "reward.extra.a.wait: no such key"),
    "reward without a path": (
        "reward.extra.a.weight=1",
        "reward.extra.a.path is not set; add reward.extra.a.path=... to the command",
    ),
    "syntax": (
        "data.system_prompt=[x",
        "data.system_prompt=[x: not understood; write KEY=VALUE, and quote a value with special characters: "
        "'KEY=\"VALUE\"'",
    ),
    "group of one": (
        "algorithm.group_size=1",
        "algorithm.group_size=1: advantage=std compares a completion with its siblings; use 2 or more",
    ),
    "not divisible": (
        "train.num_minibatches=3",
        "train.prompts_per_step=4: not divisible by train.num_minibatches=3; change one of them",
    ),
    "negative temperature": ("sampling.temperature=-1", "sampling.temperature=-1.0: use a value of at least 0"),
    "no time": ("train.time_limit_minutes=0", "train.time_limit_minutes=0.0: use a value above 0"),
    "profile beyond the end": (
        "run.profile_steps=[1,3]",
        "run.profile_steps=3: use steps from 1 to train.num_steps=2",
    ),
    "profile of another rank": (
        ["run.profile_steps=[1]", "run.profile_ranks=[1]"],
        "run.profile_ranks=1: use ranks from 0 to 0, as many as there are processes",
    ),
    "profile of no rank": (
        ["run.profile_steps=[1]", "run.profile_ranks=[]"],
        "run.profile_ranks=[]: name the ranks that are profiled, or null for all",
    ),
    "no temperature": (
        "sampling.temperature=0",
        "sampling.temperature=0: greedy completions are all equal; use a value above 0 (eval may be greedy)",
    ),
    "one turn": (
        ["environment=try_again", "environment.max_turns=1"],
        "environment.max_turns=1: the environment would never be asked; use 2 or more, or environment=none",
    ),
    "turns of a length": (
        ["environment=try_again", "sampling.min_new_tokens=3"],
        "sampling.min_new_tokens=3: with an environment turns come in rounds; use 0",
    ),
    "no such tool": (
        ["environment=tool_calls", "environment.kwargs.functions=[tools.py:add]"],
        "environment.path=fastgrpo.environment.tools:tool_calls on prompt train/0: environment.kwargs=tools.py:add: "
        "there is no file tools.py",
    ),
    "environment's argument": (
        ["environment=try_again", "environment.kwargs.tone=x"],
        "environment.kwargs.tone: fastgrpo.environment.tools:try_again has no parameter of that name to set; it has "
        "`grade`, `says`",
    ),
    "environment's failures": (
        ["environment=try_again", "environment.on_error=zero"],
        "environment.on_error=zero: choose one of fail, tell",
    ),
    "not a number": ("algorithm.entropy_coef=nan", "algorithm.entropy_coef=nan: use a finite number"),
    "infinite rate": ("train.learning_rate=inf", "train.learning_rate=inf: use a finite number"),
    "degrees of freedom": ("algorithm.std_ddof=2", "algorithm.std_ddof=2: use 1 or 0"),
    "no threads": ("cluster.num_threads=0", "cluster.num_threads=0: use a value of at least 1"),
    "no prompt tokens": ("data.max_prompt_tokens=0", "data.max_prompt_tokens=0: use a value of at least 1"),
    "long seed": ("seed=99999999999999999999", "seed=99999999999999999999: use a number of at most 63 bits"),
    "heads": (
        ["model.path=null", "model.num_kv_heads=3"],
        "model.num_kv_heads=3: use a divisor of model.num_heads=4",
    ),
    "head size": (
        ["model.path=null", "model.hidden_size=12"],
        "model.hidden_size=12: model.num_heads=4 gives heads of 3; make that even and at least 2",
    ),
    "no such token": (
        "sampling.stop_token_ids=[-1]",
        "sampling.stop_token_ids=-1: the model's tokens are 0 to",
    ),
    "cache that cannot be written": (
        ["model.path=null", "model.cache_dir=/proc/x"],
        "model.cache_dir=/proc/x: cannot be written: [Errno 2] No such file or directory: '/proc/x'; choose another",
    ),
    "open mapping": ("reward.extra=3", "reward.extra=3: wrong type; give"),
    "name of a metric": (
        "reward.extra.mean.path=fastgrpo.rewards.verifiable:exact_match",
        "reward.extra.mean.path=fastgrpo.rewards.verifiable:exact_match: reward/mean is a metric of its own; rename it",
    ),
    "unknown name": (
        "algorithm.advantage=gae",
        "algorithm.advantage=gae: choose one of std, mean, batch_std, leave_one_out, process",
    ),
    "objective": (
        "algorithm.surrogate=ppo",
        "algorithm.surrogate=ppo: choose one of clip, cispo, sapo, reinforce, or name a function of your own: "
        "FILE.py:FUNCTION",
    ),
    "reference that moves": (
        ["algorithm.reference.path=x", "algorithm.reference.schedule=ema"],
        "algorithm.reference.schedule=ema: algorithm.reference.path stays as it is; use fixed",
    ),
    "reference for nothing": (
        ["algorithm.reference.path=x", "algorithm.kl_coef=0"],
        "algorithm.reference.path=x: algorithm.kl_coef=0 has no reference; set kl_coef",
    ),
    "reference that is not there": (
        "algorithm.reference.path=./nowhere",
        "algorithm.reference.path=./nowhere: no such directory; give a Hugging Face model directory or a hub name",
    ),
    "floor without a mask": (
        "algorithm.importance_floor=0.5",
        "algorithm.importance_floor=0.5: it bounds importance_mode=mask; set that too",
    ),
    "one GPU for all ranks": (
        ["learner=megatron", "cluster.device=cuda:1"],
        "cluster.device=cuda:1: torchrun gives every process a GPU of its own; use cuda",
    ),
    "mask of no weights": (
        "algorithm.importance_mode=mask",
        "algorithm.importance_mode=mask: it masks by weights; set importance_level=token or sequence",
    ),
    "softened steps": (
        ["algorithm.advantage=process", "algorithm.overlong_buffer=4"],
        "algorithm.overlong_buffer=4: it softens a completion's reward, and advantage=process compares its steps' "
        "alone; use 0",
    ),
    "adapters twice": (
        ["model.lora.rank=4", "model.lora.path=there"],
        "model.lora.rank=4: the adapters of model.lora.path have their own; leave one of the two out",
    ),
    "moving reference of adapters": (
        ["model.lora.rank=4", "algorithm.reference.schedule=ema"],
        "algorithm.reference.schedule=ema: with model.lora the frozen model is the reference and cannot move",
    ),
    "adapters of nothing": (
        ["model.lora.rank=4", "model.lora.target_modules=[query]"],
        "model.lora.target_modules: the model has no matrix 'query'; choose among down_proj, gate_proj, k_proj",
    ),
    "negative KL": ("algorithm.kl_coef=-1", "algorithm.kl_coef=-1.0: use a value >= 0"),
    "unknown attention": (
        "cluster.attention=flash",
        "cluster.attention=flash: choose one of auto, torch, flash_attn, flash_attn_3",
    ),
    "a GPU's attention": (
        "cluster.attention=flash_attn",
        "cluster.attention=flash_attn: it is a GPU's and this run is on a CPU; use auto",
    ),
    "tracker": ("run.trackers=[paper]", "run.trackers=paper: choose any of tensorboard, wandb, mlflow"),
    "micro-batch": (
        "learner.max_tokens_per_microbatch=13",
        "learner.max_tokens_per_microbatch=13: a prompt and its completion can have 14 tokens; raise it to at least "
        "that",
    ),
    "completions that fill the context": (
        "sampling.max_new_tokens=128",
        "sampling.max_new_tokens=128: the model's context of 128 tokens leaves no room for a prompt; lower it",
    ),
    "evaluation beyond the context": (
        "eval.max_new_tokens=128",
        "eval.max_new_tokens=128: the model's context of 128 tokens leaves no room for a prompt; lower it",
    ),
    "evaluation of nothing": (
        "eval.num_prompts=0",
        "eval.num_prompts=0: use a value of at least 1, null for all, or eval.every=0",
    ),
    "no such resume": (
        "resume=elsewhere",
        "resume=elsewhere: no whole checkpoint there; give a run's directory, auto or no",
    ),
    "no such checkpoint": ("resume=elsewhere/checkpoints/step-000003", "resume=elsewhere/checkpoints/step-000003: no"),
}


@pytest.mark.parametrize("name", CONFIGURATION)
def test_a_wrong_setting_is_refused_by_key_value_and_mend(name, refusal, tiny_qwen2):
    override, expected = CONFIGURATION[name]
    overrides = [override] if isinstance(override, str) else override
    line = refusal("train", *small_run(tiny_qwen2, *overrides))
    assert line == expected or line.startswith(tuple(expected + mark for mark in " ,;")), line


JSONL = {
    "broken line": (
        '{"question": "a", "answer": "1"}\n{"question": \n',
        r"questions.jsonl line 2 is not JSON \(Expecting value, column \d+\); mend or remove the line",
    ),
    "missing column": (
        '{"prompt": "a", "answer": "1"}\n',
        r"questions.jsonl line 1 has no column 'question' \(data.prompt_column\); its columns are prompt, answer",
    ),
    "missing answer": (
        '{"question": "a"}\n{"question": "b"}\n',
        r"questions.jsonl line [12] has no column 'answer' \(data.answer_column\); its columns are question; "
        "data.answer_column=null is for data without answers",
    ),
    "empty file": ("", r"data.path=questions.jsonl has no rows; give a file with at least one"),
    "too few": (
        '{"question": "a", "answer": "1"}\n',
        r"data.eval_size=1 leaves nothing to train on: questions.jsonl has 1 different prompts; .*",
    ),
    "too long": (
        json.dumps({"question": "why? " * 30, "answer": "1"}) + '\n{"question": "b", "answer": "1"}\n',
        r"prompt (train|eval)/0 \(questions.jsonl line 1\) has 150 tokens, more than the 122 that fit; raise "
        r"data.max_prompt_tokens \(or lower sampling.max_new_tokens\), or set data.long_prompts=drop",
    ),
}


@pytest.mark.parametrize("name", JSONL)
def test_wrong_data_is_refused_by_file_and_line(name, refusal, tiny_qwen2):
    content, expected = JSONL[name]
    Path("questions.jsonl").write_text(content)
    line = refusal("train", *small_run(tiny_qwen2, "data=jsonl", "data.path=questions.jsonl", "data.eval_size=1"))
    assert re.fullmatch(expected, line), line


def test_a_file_that_is_not_there_is_refused(refusal, tiny_qwen2):
    line = refusal("train", *small_run(tiny_qwen2, "data=jsonl", "data.path=nowhere.jsonl"))
    assert line == f"data.path=nowhere.jsonl does not exist (looked in {Path.cwd()}); correct the path"


def test_a_choice_that_needs_a_value_asks_for_it(refusal, tiny_qwen2):
    line = refusal("train", f"model.path={tiny_qwen2}", "data=jsonl")
    assert line == "data.path=null: data.source=jsonl reads it; add data.path=... to the command"


def test_a_real_data_set_needs_a_real_model(refusal):
    Path("questions.jsonl").write_text('{"question": "a", "answer": "1"}\n')
    line = refusal("train", "data.path=questions.jsonl", "run.dir=run")
    assert line == "model.path=null: data.source=jsonl needs a model; give a Hugging Face directory or name"


def edit_json(path: Path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def broken_model(tiny_qwen2):
    """A copy of the model in ./model, to be spoilt."""
    shutil.copytree(tiny_qwen2, "model")
    return Path("model")


def test_a_tokenizer_without_an_end_token_is_refused(refusal, broken_model):
    edit_json(broken_model / "tokenizer_config.json", eos_token=None)
    assert refusal("train", *small_run("model")) == (
        "model.path=model: the tokenizer has no EOS token, so completions cannot end; set eos_token in its "
        "tokenizer_config.json, or model.tokenizer_path to another directory"
    )


def test_a_directory_without_a_model_is_refused(refusal):
    Path("model").mkdir()
    line = refusal("train", *small_run("model"))
    assert line == "model.path=model: the directory has no config.json; give a Hugging Face model directory"
    Path("model/adapter_config.json").touch()
    line = refusal("eval", *small_run("model"))
    assert line == "model.path=model: adapters alone; give them as model.lora.path, and their base here"


def test_a_path_to_nothing_is_refused(refusal):
    line = refusal("train", *small_run("./nowhere"))
    assert line == "model.path=./nowhere: no such directory; give a Hugging Face model directory or a hub name"


def test_an_unsupported_model_is_refused(refusal, broken_model):
    edit_json(broken_model / "config.json", model_type="gpt2")
    mend = "use one of llama, mistral, qwen2, qwen3, qwen3_moe"
    assert refusal("train", *small_run("model")) == f"model.path=model: model type 'gpt2' is not supported; {mend}"


def test_a_model_without_weights_is_refused(refusal, broken_model):
    (broken_model / "model.safetensors").unlink()
    assert refusal("train", *small_run("model")).startswith("model.path=model: cannot be loaded: ")


def test_a_layer_without_weights_is_refused(refusal, broken_model):
    edit_json(broken_model / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    line = refusal("train", *small_run(str(broken_model)))
    assert re.fullmatch(r"model.path=\S+: its files lack 12 of the weights .*, such as model.layers.2.input_.*", line)


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused(refusal, broken_model, tiny_qwen2):
    tokenizer = json.loads((broken_model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["1"] = 999
    (broken_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refusal("train", *small_run(tiny_qwen2, f"model.tokenizer_path={broken_model}"))
    assert line == (
        f"model.tokenizer_path={broken_model}: its tokenizer makes token 999, and the model's are 0 to 257; "
        "give the model's own tokenizer"
    )


def test_weights_that_are_cut_short_are_refused(refusal, broken_model):
    weights = broken_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert refusal("train", *small_run("model")).startswith("model.path=model: cannot be loaded: ")


REWARD = {
    "no module": ("no_such_module:score", r"reward.path=no_such_module:score does not import \(ModuleNotFound.*; .*"),
    "no file": ("nowhere.py:score", r"reward.path=nowhere.py:score: there is no file nowhere.py \(.*\); correct .*"),
    "no function": (f"{REWARDS}:score", r"reward.path=\S+:score: \S+ has no 'score'; it has .*varied.*"),
    "broken file": ("broken.py:score", r"reward.path=broken.py:score does not import \(SyntaxError: .*\); mend .*"),
    "text": (
        f"{REWARDS}:text",
        r"reward.path=\S+ on prompt train/\d+, completion 0 returned 'good' \(str\); return a finite number",
    ),
    "NaN": (
        f"{REWARDS}:not_a_number",
        r"reward.path=\S+ on prompt train/\d+, completion 0 returned nan; return a finite number",
    ),
    "wrong number": (
        f"{REWARDS}:too_few",
        r"reward.path=\S+ on prompt train/\d+ returned 1 values; return one per completion \(4\)",
    ),
    "unknown argument": (
        f"{REWARDS}:needs_a_colour",
        r"reward.path=\S+ asks for `colour`, which is neither one of .* nor a column of train/\d+ .*; .*",
    ),
}


@pytest.mark.parametrize("name", REWARD)
def test_a_wrong_reward_is_refused_by_path_and_sample(name, refusal, tiny_qwen2):
    path, expected = REWARD[name]
    Path("broken.py").write_text("def score(\n")
    line = refusal("train", *small_run(tiny_qwen2, f"reward.path={path}"))
    assert re.fullmatch(expected, line), line


def test_a_run_directory_that_cannot_be_made_is_refused(refusal, tiny_qwen2):
    Path("file").write_text("")
    line = refusal("train", *small_run(tiny_qwen2, "run.dir=file/run"))
    assert re.fullmatch(r"run.dir=file/run: cannot be written: .*Not a directory.*; choose another", line), line


def test_a_run_directory_that_holds_a_run_is_refused(call, tiny_qwen2):
    assert call("train", *small_run(tiny_qwen2, "train.num_steps=1"))[0] == 0
    before = Path("run/metrics.jsonl").read_bytes()
    code, _, err = call("train", *small_run(tiny_qwen2))
    assert code == 2
    assert err == "fastgrpo: run.dir=run holds a run already: set resume=auto or another run.dir\n"
    assert Path("run/metrics.jsonl").read_bytes() == before


def test_a_run_directory_in_which_another_process_trains_is_refused(refusal, tiny_qwen2):
    Path("run").mkdir()
    other = os.open("run", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    line = refusal("train", *small_run(tiny_qwen2), "resume=auto")
    assert line == "run.dir=run: another process trains there; stop it or choose another"
    os.close(other)


def test_a_refused_command_leaves_nothing_behind(refusal, tiny_qwen2):
    refusal("train", *small_run(tiny_qwen2, "run.dir=~/run", "sampling.temperature=-1"))
    refusal("train", f"model.path={tiny_qwen2}", "sampling.temperature=-1")
    refusal("train", "sampling.temperature=-1", "--multirun", "seed=0,1")
    assert [path.name for path in Path().iterdir() if path.name != "runs"] == []
    assert not Path("runs/latest").exists()


def test_a_mistake_in_the_shell_is_one_line_and_exit_code_2(workplace, tiny_qwen2):
    """In a process of its own, with nothing on stdout and no traceback."""
    command = [sys.executable, "-m", "fastgrpo", "train", *small_run(tiny_qwen2, f"reward.path={REWARDS}:text")]
    done = subprocess.run([*command, "reward.num_workers=1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"fastgrpo: reward.path=.* returned 'good' \(str\); return a finite number\n", done.stderr)


def test_ctrl_c_that_breaks_off_an_import_is_no_mistake(call, monkeypatch):
    def start(_):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise UserError("the tokenizer cannot be loaded: Could not import module 'AutoTokenizer'")

    monkeypatch.setattr("fastgrpo.main.train", start)
    assert call("train") == (130, "", "stopped\n")


def test_an_unknown_command_is_refused(refusal):
    assert refusal("trian") == "'trian' is no command; use one of train, eval, plan, verify, report"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_it_says_how_to_use_it(arguments, call):
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith("usage: fastgrpo train|eval|plan|verify|report [KEY=VALUE ...]\n")
    assert "`fastgrpo train --help` lists every key." in out


def test_plan_tells_the_step_and_whether_it_fits(call, tiny_qwen2):
    code, out, _ = call("plan", *small_run(tiny_qwen2, "cluster.memory_gb=80"))
    assert code == 0
    assert "4 prompts x 4 completions = 16 sequences" in out
    assert "fits, with nothing to move" in out
    code, out, _ = call("plan", *small_run(tiny_qwen2, "cluster.memory_gb=0.001"))
    assert code == 1
    assert "does not fit: training needs" in out
    assert not Path("run").exists()


def test_help_lists_every_key_with_its_meaning_and_every_choice(call):
    code, out, _ = call("train", "--help")
    assert code == 0
    leaves = [key for key in all_keys() if not any(other.startswith(f"{key}.") for other in all_keys())]
    assert len(leaves) > 90
    for key in leaves:
        assert f"\n  {key}=" in out, key
    assert "  algorithm.group_size=8\n      G, completions per prompt.\n" in out
    assert "  algorithm   cispo | dapo | dr_grpo | grpo | gspo | rloo | sapo\n" in out
    assert "--multirun" in out
    assert call("eval", "--help")[1].startswith("usage: fastgrpo eval [KEY=VALUE ...]\n")


def test_cfg_prints_the_configuration_and_trains_nothing(call, tiny_qwen2):
    code, out, err = call("train", *small_run(tiny_qwen2), "--cfg", "job")
    assert (code, err) == (0, "")
    assert f"\nmodel:\n  path: {tiny_qwen2}\n" in out
    assert "\nalgorithm:\n  group_size: 4\n  advantage: std\n" in out
    assert list(Path().iterdir()) == []


def test_settings_of_open_mappings_need_no_plus(call):
    code, out, _ = call(
        "train",
        *("reward.kwargs.which=3", "reward.kwargs={colour: red}", "data.chat_template_kwargs.enable_thinking=false"),
        *("reward.extra.short.path=a.py:brief", "reward.extra.short.weight=0.5", "reward.extra.short.kwargs.most=6"),
        *("--cfg", "job", "--resolve", "--package", "reward"),
    )
    assert code == 0
    assert "kwargs:\n  which: 3\n  colour: red\n" in out
    assert "extra:\n  short:\n    path: a.py:brief\n    weight: 0.5\n    kwargs:\n      most: 6\n" in out


def test_train_leaves_a_run_directory(call, tiny_qwen2):
    code, out, err = call("train", *small_run(tiny_qwen2, "run.trackers=[tensorboard]"))
    assert (code, err) == (0, "")
    assert "a step       4 prompts x 4 completions = 16 sequences\n" in out
    assert "done: the policy is in run/hf, the report in run/report.html\n" in out
    left = {"checkpoints", "config.yaml", "hf", "metrics.jsonl", "report.html", "samples.jsonl", "tensorboard"}
    assert {path.name for path in Path("run").iterdir()} == left
    assert "  num_steps: 2\n" in Path("run/config.yaml").read_text()
    code, _, err = call("train", "--config-dir=run", "--config-name=config", "run.dir=again")
    assert (code, err) == (0, "")
    policies = [Path(run, "hf/model.safetensors").read_bytes() for run in ("run", "again")]
    assert policies[0] == policies[1]
    assert {path.name for path in Path().iterdir()} == {"run", "again"}
    Path("mine.yaml").write_text("train: {num_steps: 1}")
    _, _, err = call("train", "--config-dir=.", "--config-name=mine", "run.dir=other")
    assert err == "fastgrpo: run.dir: not in your configuration; begin it with `defaults: [train, _self_]`\n"


def test_runs_latest_points_to_the_newest_run(call, tiny_qwen2, monkeypatch):
    Path("it's a,(b)=c").mkdir()  # Hydra's grammar knows all of these
    monkeypatch.chdir("it's a,(b)=c")
    Path("scratch").mkdir()
    Path("runs").mkdir()
    Path("runs/mine").symlink_to("../scratch")
    small = [argument for argument in small_run(tiny_qwen2, "train.num_steps=1") if "run.dir" not in argument]
    assert call("train", *small, "run.dir=runs/mine/first")[0] == 0
    assert Path("runs/latest").resolve() == Path("runs/mine/first").resolve()
    assert call("train", *small, "run.name=mine", "seed=1")[0] == 0
    assert Path("runs/latest").resolve().parent == Path("runs/mine").resolve()
    assert len(read_jsonl("runs/latest/metrics.jsonl")) == 2
    more = ("train.num_steps=2", "resume=auto")
    assert "generated problems follow the seed" in call("train", *small, *more)[2]
    code, out, _ = call("train", *small, *more, "seed=1")
    assert code == 0
    assert f"resuming after step 1 from {Path('runs/latest').resolve()}" in out
    assert len(list(Path("runs/mine").iterdir())) == 2


@pytest.mark.parametrize(
    ("resume", "run_dir"),
    [
        ("it's/checkpoints/step-000003", ["run.dir='it\\'s'"]),
        ("it's", ["run.dir='it\\'s'"]),
        ("backups/step-000003", []),  # whose parent's parent is no run
        ("nowhere", []),
    ],
)
def test_a_resumed_run_goes_on_in_its_own_directory(resume, run_dir, workplace):
    Path("it's/checkpoints/step-000003").mkdir(parents=True)
    Path("backups/step-000003").mkdir(parents=True)
    assert with_run_dir([f"resume={resume}"])[1:] == run_dir


def test_a_run_that_cannot_have_runs_latest(call, tiny_qwen2, monkeypatch):
    small = [argument for argument in small_run(tiny_qwen2, "train.num_steps=1") if "run.dir" not in argument]
    assert call("train", *small, "run.dir=runs/mine/first")[0] == 0
    assert call("train", *small, "run.dir=runs/mine/second", "reward.path=nowhere.py:score")[0] == 2
    assert Path("runs/latest").resolve() == Path("runs/mine/first").resolve()

    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    code, out, _ = call("train", *small, "run.dir=runs/mine/third")
    assert code == 0
    assert "runs/latest does not point to this run (no links here)\n" in out


def test_multirun_gives_each_run_its_own_directory(call, tiny_qwen2):
    small = [argument for argument in small_run(tiny_qwen2, "train.num_steps=1") if "run.dir" not in argument]
    code, _, err = call("train", *small, "--multirun", "seed=0,1", "hydra.sweep.dir=sweep")
    assert (code, err) == (0, "")
    assert sorted(path.name for path in Path("sweep").iterdir() if path.is_dir()) == ["0", "1"]
    for number in (0, 1):
        assert f"\nseed: {number}\n" in "\n" + Path(f"sweep/{number}/config.yaml").read_text()
        assert len(read_jsonl(f"sweep/{number}/metrics.jsonl")) == 2


def test_a_sweep_goes_on_in_its_own_directories(call, tiny_qwen2):
    small = [argument for argument in small_run(tiny_qwen2) if "run.dir" not in argument]
    sweep = ("--multirun", "seed=0,1", "hydra.sweep.dir=runs/sweep", "resume=auto")
    for expected in ([1, None], [2, 1], [2, 2]):  # a step and no more, of a run that is not done, is made in any case
        code = call("train", *small, *sweep, "train.time_limit_minutes=1e-6")[0]
        assert code == (0 if expected == [2, 2] else 124)
        rows = [read_jsonl(f"runs/sweep/{number}/metrics.jsonl") for number in (0, 1)]
        assert [row[-1]["step"] if row else None for row in rows] == expected
        assert [Path(f"runs/sweep/{number}/hf").exists() for number in (0, 1)] == [step == 2 for step in expected]


def test_multirun_goes_on_after_a_mistake_and_says_it(call, tiny_qwen2):
    small = [argument for argument in small_run(tiny_qwen2, "train.num_steps=1") if "run.dir" not in argument]
    code, _, err = call("train", *small, "-m", "sampling.temperature=-1,1", "hydra.sweep.dir=sweep")
    assert (code, err) == (2, "fastgrpo: sampling.temperature=-1.0: use a value of at least 0\n")
    assert len(read_jsonl("sweep/1/metrics.jsonl")) == 2


def test_plan_of_a_cluster_refuses_the_cuts_that_a_run_would(call, refusal, tiny_qwen2):
    cut = ("learner=megatron", "learner.tp=2", "learner.pp=2", "sampler=vllm", "sampler.tp=4", "cluster.memory_gb=80")
    code, out, _ = call("plan", *small_run(tiny_qwen2, *cut, "cluster.num_ranks=8"))
    assert code == 0
    assert "8 = tp=2 x pp=2 x 2 data parallel" in out
    assert "1 + 1 layers, the last with the head" in out
    assert "4 = tp=2 x pp=2 x 1 data parallel" in call("plan", *small_run(tiny_qwen2, *cut))[1]
    line = refusal("plan", *small_run(tiny_qwen2, *cut, "learner.pp=1", "cluster.num_ranks=6"))
    count = "does not divide the number of processes (torchrun can start a multiple of 4)"
    assert line == f"sampler.tp=4: {count}; possible with 6 processes: 1, 2"
    line = refusal("plan", *small_run(tiny_qwen2, *cut, "learner.pp=3", "cluster.num_ranks=12"))
    assert line.startswith("learner.pp=3: more stages than the model's 2 layers; possible with 12 processes: ")
    line = refusal("plan", *small_run(tiny_qwen2, *cut, "sampler.tp=8", "cluster.num_ranks=8"))
    heads = "cannot cut the model's 4 attention and 2 key/value heads"
    assert line == f"sampler.tp=8: {heads}; possible with 8 processes: 1, 2, 4"


def test_report_writes_the_page_again(call, tiny_qwen2):
    assert call("train", *small_run(tiny_qwen2, "train.num_steps=1"))[0] == 0
    page = Path("run/report.html")
    page.unlink()
    Path("run/report.html.tmp").mkdir()  # as good as a full disk
    line = "run.dir=run: report.html cannot be written there: [Errno 21] Is a directory: 'run/report.html.tmp'"
    assert call("report", "run.dir=run") == (2, "", f"fastgrpo: {line}\n")
    Path("run/report.html.tmp").rmdir()
    samples = Path("run/samples.jsonl").rename("run/samples")
    Path("run/samples.jsonl").mkdir()
    assert call("train", *small_run(tiny_qwen2, "resume=auto"))[2] == (
        "fastgrpo: run.dir=run: [Errno 21] Is a directory: 'run/samples.jsonl'; make room or mend the disk, then try "
        "again\n"
    )
    Path("run/samples.jsonl").rmdir()
    samples.rename("run/samples.jsonl")
    assert call("report", "run.dir=run") == (0, "run/report.html\n", "")
    assert "<html" in page.read_text()
    assert call("report", "run") == (2, "", "fastgrpo: run: `fastgrpo report` knows run.dir=PATH alone\n")
    assert call("report", "--help")[1].startswith("usage: fastgrpo report [run.dir=PATH]")


def test_report_of_no_run_is_refused(refusal):
    assert refusal("report") == "run.dir=runs/latest: no metrics.jsonl there; give a run's directory"


def test_eval_measures_a_model(call, tiny_qwen2):
    small = [argument for argument in small_run(tiny_qwen2, reward="one") if "run.dir" not in argument]
    code, out, err = call("eval", *small, "eval.num_samples=4", "eval.temperature=1")
    assert (code, err) == (0, "")
    values = {name: float(value) for name, value in (line.split() for line in out.splitlines())}
    assert values["eval/accuracy"] == values["eval/reward"] == values["eval/pass@2"] == values["eval/pass@4"] == 1.0
    assert 1.0 <= values["eval/response_length"] <= 6.0
    small = [argument.replace(":one", ":varied") for argument in small]
    drawn, likeliest, nucleus = (
        call("eval", *small, "eval.temperature=1", *more)[1] for more in ([], ["eval.top_k=1"], ["eval.top_p=1e-6"])
    )
    assert drawn != likeliest == nucleus
    assert list(Path().iterdir()) == []


def test_eval_measures_a_checkpoint(call, tiny_qwen2):
    small = small_run(tiny_qwen2, "eval.every=1", "checkpoint.every=1", "train.learning_rate=0.01")
    assert call("train", *small)[0] == 0
    measured = {row["step"]: f"{row['eval/reward']:.4f}" for row in read_jsonl("run/metrics.jsonl")}
    assert len(set(measured.values())) == 3
    small.remove("run.dir=run")
    for where, step in (("run/checkpoints/step-000001", 1), ("run", 2)):
        code, out, err = call("eval", *small, f"resume={where}")
        assert (code, err) == (0, "")
        assert measured[step] in out
    assert len(list(Path("run/checkpoints").iterdir())) == 2
    _, _, err = call("eval", *small, "resume=auto", "run.dir=other")
    assert err == "fastgrpo: resume=auto: no checkpoint in other to measure; give a run's directory\n"


def test_eval_without_held_out_questions_is_refused(refusal, tiny_qwen2):
    line = refusal("eval", *small_run(tiny_qwen2, "data.eval_size=0"))
    assert line == "data.eval_size=0: no held-out questions to measure on; raise it or give data.eval_path"


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_other_families_train_too(call, tmp_path, kind):
    model = save_tiny_model(tmp_path / "model", kind)
    assert call("train", *small_run(model, "train.num_steps=1"))[0] == 0
    assert load_config("run/hf").model_type == kind


def test_a_path_selects_the_groups_that_go_with_it(call, tiny_qwen2):
    """The quickstart's learning rate must not meet a real model."""
    Path("shards").mkdir()
    Path("shards/0.parquet").touch()
    for value, source in (
        ('"my q.jsonl"', "jsonl"),
        ("[shards/*,b.jsonl]", "parquet"),
        ("['my q.jsonl', shards]", "jsonl"),
        ("shards", "parquet"),
        ("train-*", "jsonl"),
    ):
        _, out, _ = call("train", f"model.path={tiny_qwen2}", f"data.path={value}", "reward=gsm8k", "--cfg", "job")
        assert f"\n  source: {source}\n" in out, value
    assert "\n  learning_rate: 1.0e-06\n" in out
    assert "\n  path: fastgrpo.rewards.verifiable:gsm8k\n" in out
