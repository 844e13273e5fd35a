"""`fastgrpo train --help`: every key with its default and meaning, for someone who has never seen Hydra."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fastgrpo import config as schema

CONF = Path(__file__).parent / "conf"
WIDTH = 100
EXAMPLES = {
    "train": """\
  fastgrpo train                                                   the quickstart: a tiny policy learns to add
  fastgrpo train data=subtraction seed=1                           another task, another seed
  fastgrpo train algorithm=dapo train.learning_rate=1e-4           another objective, another rate
  fastgrpo train model.path=DIR data.path=FILE.jsonl reward=gsm8k  your model and data
  fastgrpo train run.dir=runs/mine resume=auto                     go on where runs/mine stopped
  fastgrpo train --multirun algorithm=grpo,dapo seed=0,1           four runs
  fastgrpo train --config-dir runs/mine --config-name config run.dir=runs/again   the same run once more
  fastgrpo train --cfg job                                         print the configuration and stop""",
    "eval": """\
  fastgrpo eval model.path=runs/latest/hf sampling.max_new_tokens=40   the quickstart's policy, greedy
  fastgrpo eval model.path=DIR data.path=FILE.jsonl reward=gsm8k eval.num_samples=8 eval.temperature=1
  fastgrpo eval model.path=DIR data.path=FILE.jsonl reward=gsm8k resume=runs/mine/checkpoints/step-000050""",
    "plan": """\
  fastgrpo plan model.path=DIR data.path=FILE.jsonl                what a step does, and whether it fits here
  fastgrpo plan model.path=DIR learner=megatron learner.tp=4 cluster.num_ranks=64 cluster.memory_gb=80""",
    "verify": """\
  fastgrpo verify                                                  every objective, on a GPU if there is one
  fastgrpo verify device=cuda dtypes=[bfloat16] vocab_size=151936""",
}


def text(command: str, cls: type = schema.Config) -> str:
    """The whole help page of a command with this schema."""
    choices = ""
    if cls is schema.Config:
        groups = "\n".join(f"  {name:<12}{' | '.join(options)}" for name, options in group_choices().items())
        choices = f"Choices, each a file in conf/:\n{groups}\n\nA choice may set other defaults than these.\n\n"
    sections = "\n\n".join(_section(name, cls) for name, cls in _sections(cls))
    return f"""\
usage: fastgrpo {command} [KEY=VALUE ...]

{EXAMPLES[command]}

{choices}Keys and their defaults:

{sections}

{command} is a Hydra application: --cfg job|hydra|all, --multirun, --config-dir and --hydra-help work as Hydra's users
expect.
"""


def group_choices() -> dict[str, list[str]]:
    """The configuration groups and what each offers."""
    folders = sorted(path for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def all_keys(cls: type = schema.Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        yield prefix + field.name
        if is_dataclass(hints[field.name]):
            yield from all_keys(hints[field.name], f"{prefix}{field.name}.")


def _sections(root: type) -> Iterator[tuple[str, type]]:
    yield "", root
    pending = [("", root)]
    while pending:
        prefix, cls = pending.pop(0)
        hints = get_type_hints(cls)
        nested = [(f"{prefix}{f.name}.", hints[f.name]) for f in fields(cls) if is_dataclass(hints[f.name])]
        yield from nested
        pending += nested


def _section(prefix: str, cls: type) -> str:
    hints, docs = get_type_hints(cls), _field_docs(cls)
    title = (inspect.getdoc(cls) or "").splitlines()[0]
    lines = [f"{title}"]
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            continue
        key = f"  {prefix}{field.name}={_default(field)}"
        doc = docs.get(field.name, "")
        lines.append(key)
        lines += textwrap.wrap(doc, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _default(field: Any) -> str:
    value = field.default if field.default is not MISSING else field.default_factory()
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field, which Python itself does not keep."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs
