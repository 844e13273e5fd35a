"""Every named choice in conf/ composes into a configuration that can run, and says what its paper says."""

from pathlib import Path

import pytest

from fastgrpo.algorithms.objective import objective_of
from fastgrpo.config import AlgorithmConfig, Config
from fastgrpo.help import group_choices
from fastgrpo.kernels.objective import Objective
from fastgrpo.main import CONF, compose, with_shorthands
from fastgrpo.validate import validate

CHOICES = [(group, choice) for group, choices in group_choices().items() for choice in choices]
ALGORITHMS = group_choices()["algorithm"]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "2+3=", "answer": "5"}\n')
    return path


def config_of(*overrides: str) -> Config:
    return compose("train", with_shorthands(list(overrides)))[0]


def test_the_default_is_the_quickstart():
    config = config_of()
    assert validate(config) == []
    assert (config.model.path, config.data.source, config.data.operation) == (None, "arithmetic", "addition")
    assert (config.algorithm.group_size, config.algorithm.kl_coef) == (8, 0.04)
    assert config.train.learning_rate > 1e-5  # a tiny model's, not the schema's
    assert config.run.dir.startswith("runs/quickstart/")


def test_eval_reads_the_same_keys():
    assert compose("eval", ["run.dir=x"])[0] == compose("train", ["run.dir=x"])[0]


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: value)
def test_every_choice_composes_and_validates(group, choice, questions):
    needed = {
        "model/hf": ["model.path=some/model"],
        "data/jsonl": [f"data.path={questions}", "model.path=some/model"],
        "data/parquet": [f"data.path={questions}", "model.path=some/model"],
        "data/hub": ["data.path=openai/gsm8k", "model.path=some/model"],
        "experiment/gsm8k": [f"data.path={questions}", "model.path=some/model"],
    }.get(f"{group}/{choice}", [])
    config = config_of(f"{group}={choice}", *needed)
    assert validate(config) == []
    assert isinstance(objective_of(config.algorithm, temperature=config.sampling.temperature), Objective)


def test_every_folder_and_file_of_conf_is_a_choice():
    """So that the tests above see them all."""
    files = {str(path.relative_to(CONF)) for path in Path(CONF).rglob("*.yaml")}
    commands = {"train.yaml", "eval.yaml", "plan.yaml", "verify.yaml"}
    assert files == commands | {f"{group}/{choice}.yaml" for group, choice in CHOICES}
    assert {group for group, _ in CHOICES} >= {"model", "data", "reward", "algorithm", "learner", "sampler", "cluster"}


GRPO = {
    "group_size": 8,
    "advantage": "std",
    "std_ddof": 1,
    "min_std": 0.0,
    "aggregation": "sequence_mean",
    "surrogate": "clip",
    "ratio_level": "token",
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "dual_clip": None,
    "kl_coef": 0.04,
    "kl_estimator": "k3",
    "kl_times_ratio": False,
    "entropy_coef": 0.0,
    "dynamic_sampling": False,
    "overlong_buffer": 0,
    "mask_truncated": False,
    "importance_level": "none",
}
# What each paper changes, and nothing else.
PAPERS = {
    "grpo": {},  # arXiv 2402.03300, equations 3 and 4, section 4.2
    "dapo": {  # 2503.14476, section 4.1
        "aggregation": "token_mean",
        "clip_ratio_high": 0.28,
        "kl_coef": 0.0,
        "dynamic_sampling": True,
    },
    "dr_grpo": {"advantage": "mean", "aggregation": "constant", "kl_coef": 0.0},  # 2503.20783
    "gspo": {  # 2507.18071, section 5.1
        "ratio_level": "sequence",
        "clip_ratio_low": 3e-4,
        "clip_ratio_high": 4e-4,
        "kl_coef": 0.0,
    },
    "cispo": {  # 2506.13585: no lower bound, and the mean over tokens
        "surrogate": "cispo",
        "aggregation": "token_mean",
        "clip_ratio_low": 1.0,
        "clip_ratio_high": 0.28,
        "kl_coef": 0.0,
    },
    "sapo": {"surrogate": "sapo", "kl_coef": 0.0},  # 2511.20347
    "rloo": {  # 2402.14740
        "advantage": "leave_one_out",
        "surrogate": "reinforce",
        "aggregation": "constant",
        "kl_coef": 0.0,
    },
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithm_is_what_its_paper_says(algorithm):
    config = config_of(f"algorithm={algorithm}").algorithm
    for key, value in {**GRPO, **PAPERS[algorithm]}.items():
        assert getattr(config, key) == value, key
    assert (config.sapo_tau_pos, config.sapo_tau_neg) == (1.0, 1.05)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithm_becomes_its_objective(algorithm):
    config = config_of(f"algorithm={algorithm}", "sampling.temperature=0.7")
    objective = objective_of(config.algorithm, temperature=config.sampling.temperature)
    assert objective.temperature == 0.7
    for key in ("surrogate", "ratio_level", "clip_ratio_low", "clip_ratio_high", "kl_coef", "kl_estimator"):
        assert getattr(objective, key) == getattr(config.algorithm, key), key


def test_the_schema_defaults_are_grpo():
    schema, composed = AlgorithmConfig(), config_of("algorithm=grpo").algorithm
    assert schema == composed


def test_the_papers_experiment_has_the_papers_numbers():
    """1024 sequences a step, 64 a question, learning rate 1e-6, KL 0.04, 1024 tokens: arXiv 2402.03300, section 4.2."""
    config = config_of("model.path=some/model", "experiment=deepseekmath")
    assert config.train.prompts_per_step * config.algorithm.group_size == 1024
    assert (config.algorithm.group_size, config.algorithm.kl_coef) == (64, 0.04)
    assert (config.train.learning_rate, config.sampling.max_new_tokens) == (1e-6, 1024)
    assert config.train.updates_per_rollout == 1


def test_the_gsm8k_experiment_needs_a_model_and_a_file_alone(questions):
    config = config_of("experiment=gsm8k", "model.path=some/model", f"data.path={questions}")
    assert config.reward.path == "fastgrpo.rewards.verifiable:gsm8k"
    assert config.data.source == "jsonl"
    assert "\n" in config.data.prompt_template  # a line break, not a backslash and an n


def test_an_experiment_wins_over_the_quickstart_and_the_command_line_over_both(questions):
    config = config_of("experiment=gsm8k", "model.path=some/model", f"data.path={questions}", "train.num_steps=7")
    assert (config.train.num_steps, config.train.prompts_per_step) == (7, 64)


def test_small_groups_are_warned_of():
    warnings = validate(config_of("algorithm.group_size=3"))
    assert len(warnings) == 1
    assert warnings[0].startswith("algorithm.group_size=3: the standard deviation of fewer than 4 rewards is noise; ")
    assert validate(config_of("algorithm.group_size=3", "algorithm=dr_grpo")) == []
