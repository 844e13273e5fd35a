"""The command line: `fastgrpo train|eval|plan|verify|report KEY=VALUE ...`.

Each command is a Hydra application. What the user can mend ends in one line on stderr and exit code 2.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fastgrpo.config import Config, UserError
from fastgrpo.data_files import kind_of
from fastgrpo.nodes import JobError, first_of_node, whoami
from fastgrpo.signals import noting_ctrl_c
from fastgrpo.time_limit import TIME_IS_UP

RUNS = Path("runs")
SPEAK_AFTER_FIRST_S = 5.0
CONF = str(Path(__file__).resolve().parent / "conf")
HYDRA_OPTIONS = (  # noqa: SIM905
    "--hydra-help --version --cfg -c --resolve --package -p --run -r --multirun -m --shell-completion -sc "
    "--config-path -cp --config-name -cn --config-dir -cd --experimental-rerun --info -i"
).split()


OPEN_MAPPINGS = (
    *("reward.extra", "reward.kwargs", "environment.kwargs", "data.chat_template_kwargs"),
    *("algorithm.surrogate_kwargs", "algorithm.advantage_kwargs", "surrogate_kwargs"),
)


def main() -> None:
    """The console script. Exit codes: 0 done, 2 a mistake of the user's, 124 where train.time_limit_minutes stopped it,
    128 + signal where one did."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "eval": evaluate,
        "plan": plan,
        "verify": verify,
        "report": report,
    }
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h"):
        print(f"usage: fastgrpo {'|'.join(commands)} [KEY=VALUE ...]\n\n`fastgrpo train --help` lists every key.")
        sys.exit(0)
    if command not in commands:
        fail(f"{command!r} is no command; use one of {', '.join(commands)}")
    with noting_ctrl_c() as interrupts:
        try:
            sys.exit(commands[command](arguments))
        except BrokenPipeError:  # `fastgrpo train --help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (Exception, KeyboardInterrupt) as error:
            if interrupts or isinstance(error, KeyboardInterrupt):  # an import that it breaks off raises what it likes
                print("stopped", file=sys.stderr)
                sys.exit(130)
            if isinstance(error, UserError):
                fail(str(error), of_job=isinstance(error, JobError))
            raise


def fail(message: str, *, of_job: bool = False) -> NoReturn:
    """Print one line and exit with 2. of_job: the line itself says whose it is."""
    if not first_of_node():
        # Most mistakes are found on every rank. A node's first speaks first, and torchrun then ends this process.
        time.sleep(SPEAK_AFTER_FIRST_S)
    owner = "" if of_job or os.environ.get("RANK", "0") == "0" else f"{whoami()}: "
    print(f"fastgrpo: {owner}{message}", file=sys.stderr)
    sys.exit(2)


def train(arguments: list[str]) -> int:
    """Train a policy; see `fastgrpo train --help`."""
    task = partial(_train, began=time.monotonic())  # all runs of a sweep together have the time of one job
    code = run_hydra("train", with_run_dir(with_shorthands(arguments)), task)
    # torchrun takes all but 0 for a failure: it would end the other ranks, start all again where it may, and say 1.
    return 0 if code == TIME_IS_UP and "TORCHELASTIC_RUN_ID" in os.environ else code


def evaluate(arguments: list[str]) -> int:
    """Measure a policy on the held-out questions."""
    return run_hydra("eval", with_run_dir(with_shorthands(arguments)), _evaluate)


def plan(arguments: list[str]) -> int:
    """What `fastgrpo train` with these settings would do and hold in memory; loads the data, and no weights."""
    return run_hydra("plan", with_shorthands(arguments), _plan)


def verify(arguments: list[str]) -> int:
    """Compare this machine's loss head with float64, for every objective; exit code 1 where anything is off."""
    from fastgrpo.verify import VerifyConfig, everything
    from fastgrpo.verify.table import report

    return run_hydra("verify", arguments, lambda config, _: report(list(everything(config))), VerifyConfig)


def report(arguments: list[str]) -> int:
    """Write report.html of a run again: `fastgrpo report [run.dir=PATH]`."""
    from fastgrpo.report import write_report

    if any(argument in ("--help", "-h") for argument in arguments):
        print("usage: fastgrpo report [run.dir=PATH]\n\nWrites PATH/report.html again; without a path, runs/latest's.")
        return 0
    for argument in arguments:
        if not argument.startswith("run.dir="):
            raise UserError(f"{argument}: `fastgrpo report` knows run.dir=PATH alone")
    directory = Path(value_of(arguments, "run.dir") or RUNS / "latest").expanduser()
    if not (directory / "metrics.jsonl").is_file():
        raise UserError(f"run.dir={directory}: no metrics.jsonl there; give a run's directory")
    try:
        print(write_report(directory))
    except OSError as error:
        raise UserError(f"run.dir={directory}: report.html cannot be written there: {error}") from error
    return 0


def run_hydra(name: str, arguments: list[str], task: Callable[[Any, str], int], schema: type = Config) -> int:
    """Compose conf/<name>.yaml with the arguments and call the task with the schema's dataclasses and their YAML."""
    if any(argument in ("--help", "-h") for argument in arguments):
        from fastgrpo import help as help_page

        print(help_page.text(name, schema))
        return 0
    refuse_unknown_options(arguments)
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    started = False
    codes: list[int] = []
    mistakes: list[UserError] = []

    def job(composed: Any) -> None:
        nonlocal started
        started = True
        if any(code >= TIME_IS_UP for code in codes):  # a signal that stopped one run of a sweep stops the sweep
            return
        if schema is Config and HydraConfig.get().mode == RunMode.MULTIRUN and value_of(arguments, "run.dir") is None:
            composed.run.dir = HydraConfig.get().runtime.output_dir
        try:
            with hydra_errors_in_one_line(schema):
                settings = converted(composed, schema)
            codes.append(task(*settings))
        except UserError as error:  # past Hydra, which would announce it in its own words
            mistakes.append(error)

    # Hydra would print its own traceback and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Its parser wants all settings in a row, wherever the user put the options.
    sys.argv = [f"fastgrpo {name}", *sorted(map(open_mapping, [*arguments, *quiet(arguments)]), key=is_setting)]
    try:
        with hydra_errors_in_one_line(schema):
            hydra.main(version_base="1.3", config_path=CONF, config_name=name)(job)()
    except OSError as error:
        if started:
            raise
        reason = f"{error.filename} cannot be made ({error.strerror})"
        raise UserError(f"hydra.sweep.dir: {reason}; choose another") from None
    if mistakes:
        raise mistakes[0]
    return max(codes, default=0)


def compose(name: str, arguments: list[str]) -> tuple[Config, str]:
    """conf/<name>.yaml with the arguments, as dataclasses and as YAML, for callers that are not the command line."""
    import hydra

    with (
        hydra_errors_in_one_line(),
        _hydra_of_the_caller_aside(),
        hydra.initialize_config_dir(CONF, version_base="1.3"),
    ):
        return converted(hydra.compose(name, [open_mapping(argument) for argument in arguments]))


@contextmanager
def _hydra_of_the_caller_aside() -> Iterator[None]:
    """The caller's own script may be a Hydra application, and there is one Hydra a process."""
    from hydra.core.global_hydra import GlobalHydra

    callers, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = callers


def converted(composed: Any, schema: type = Config) -> tuple[Any, str]:
    """The composed configuration as dataclasses, and resolved as YAML. A --config-name of the user's, such as a run's
    config.yaml, need not name the schema.

    Raises UserError where a value is missing, or a key is none of the schema's, which Hydra lets +KEY=VALUE add."""
    from omegaconf import OmegaConf

    from fastgrpo.hydra_errors import refuse_added_keys

    composed = OmegaConf.merge(OmegaConf.structured(schema), composed)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(f"{missing[0]} is not set; add {missing[0]}=... to the command")
    config: Any = OmegaConf.to_object(composed)
    refuse_added_keys(config, schema)
    return config, OmegaConf.to_yaml(composed, resolve=True)


@contextmanager
def hydra_errors_in_one_line(schema: type = Config) -> Iterator[None]:
    """Register the schema, and turn what Hydra and OmegaConf raise while composing into UserError."""
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from fastgrpo.hydra_errors import explain

    ConfigStore.instance().store(name="schema", node=schema)
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, schema)) from None


def _train(config: Config, text: str, *, began: float) -> int:
    from fastgrpo import commands

    code, _ = commands.train(config, text, began=began)
    return code or 0


def _evaluate(config: Config, text: str) -> int:
    from fastgrpo import commands

    for name, value in commands.evaluate(config).items():
        print(f"{name:<24}{value:.4f}")
    return 0


def _plan(config: Config, text: str) -> int:
    from fastgrpo import commands

    plan, lines = commands.plan(config)
    print(lines)
    return 0 if plan.fits else 1


def quiet(arguments: list[str]) -> list[str]:
    """What conf/train.yaml says of Hydra itself, where the user's own --config-name takes its place."""
    if not names_config(arguments):
        return []
    logging = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
    return ["hydra.run.dir=.", "hydra.output_subdir=null", *logging]


def names_config(arguments: list[str]) -> bool:
    """Whether the user's own configuration takes the place of conf/train.yaml."""
    return any(argument.split("=")[0] in ("--config-name", "-cn") for argument in arguments)


def refuse_unknown_options(arguments: list[str]) -> None:
    """argparse would answer `--learning-rate 1e-4` with its whole usage."""
    for argument in arguments:
        if argument.startswith("-") and argument.split("=")[0] not in HYDRA_OPTIONS:
            raise UserError(f"{argument}: no such option; settings are KEY=VALUE, such as train.learning_rate=1e-4")


def is_setting(argument: str) -> bool:
    """Whether it is KEY=VALUE, or Hydra's ~KEY, and no option."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def open_mapping(argument: str) -> str:
    """A setting of a mapping whose names are the user's own, in the form that makes Hydra take a new name.

    reward.kwargs.tags=x becomes ++reward.kwargs.tags=x, and reward.extra.short.weight=2 becomes
    ++reward.extra={short: {weight: 2}}: OmegaConf makes a new RewardTerm of a whole mapping only.
    """
    key, equals, value = argument.lstrip("+").partition("=")
    if not equals or not key.startswith(OPEN_MAPPINGS):
        return argument
    if key.startswith("reward.extra."):
        for name in reversed(key.removeprefix("reward.extra.").split(".")):
            value = f"{{{name}: {value}}}"
        key = "reward.extra"
    return f"++{key}={value}"


def value_of(arguments: list[str], key: str) -> str | None:
    """The value that the arguments give a key, without the quotes that a path with a space needs, or None."""
    for argument in reversed(arguments):
        if argument.lstrip("+").startswith(f"{key}="):
            return argument.split("=", 1)[1].strip("'\"")
    return None


def setting(key: str, path: Path) -> str:
    """The argument that sets a key to a path, whatever characters are in it."""
    quoted = str(path).replace("'", "\\'")
    return f"{key}='{quoted}'"


def with_shorthands(arguments: list[str]) -> list[str]:
    """`model.path=X` selects model=hf, and `data.path=FILE.jsonl` selects data=jsonl, where nothing else is chosen.

    So the defaults that suit the quickstart never meet a real model.
    """
    added: list[str] = []
    if names_config(arguments):  # which has no choices
        return arguments
    path = value_of(arguments, "model.path")
    if path not in (None, "null") and value_of(arguments, "model") is None:
        added.append("model=hf")
    named = (value_of(arguments, "data.path") or "").split(",")  # roughly: only Hydra knows what is a list
    kind = kind_of(name.strip(" []'\"") for name in named)
    if kind is not None and value_of(arguments, "data") is None:
        added.append(f"data={kind}")
    return [*added, *arguments]


def with_run_dir(arguments: list[str]) -> list[str]:
    """resume=auto without a run.dir goes on in runs/latest, and resume=PATH in the run that the path belongs to; of a
    checkpoint that is in none, somebody's copy, a new run begins.

    Not in a sweep, each of whose runs has a directory of its own under hydra.sweep.dir."""
    resume, sweeps = value_of(arguments, "resume"), {"--multirun", "-m"}.intersection(arguments)
    if resume in (None, "no") or value_of(arguments, "run.dir") is not None or sweeps:
        return arguments
    if resume == "auto":
        latest = RUNS / "latest"
        return [*arguments, setting("run.dir", latest.resolve())] if latest.is_dir() else arguments
    path = Path(str(resume)).expanduser()
    if path.parent.name == "checkpoints":
        return [*arguments, setting("run.dir", path.parent.parent)]
    return [*arguments, setting("run.dir", path)] if (path / "checkpoints").is_dir() else arguments
