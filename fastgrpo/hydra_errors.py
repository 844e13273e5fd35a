"""Hydra's and OmegaConf's errors in one line: the key, the value, the mend."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import OverrideParseException

from fastgrpo.config import UserError
from fastgrpo.help import all_keys, group_choices


def explain(error: BaseException, schema: type) -> str:
    """One line for whatever the composition of a configuration raises."""
    chain = list(_chain(error))
    text = "\n".join(str(link) for link in chain)
    unreadable = next((link.override for link in chain if isinstance(link, OverrideParseException)), None)
    if unreadable is not None:
        return _unreadable(unreadable)
    for pattern, say in (
        (r"Could not override '([^']+)'", lambda key: _unknown_key(key, schema)),
        (r"Key '([^']+)' not in '[^']+'[\s\S]*?full_key: (\S+)", lambda _, full: _unknown_key(full, schema)),
        (r"Could not find '([\w]+)/([^']+)'", _unknown_choice),
        (r"An item is already at '([^']+)'", lambda key: f"+{key}: the key is there already; leave out the +"),
        (r"Multiple values for (\w+)\.", lambda group: f"+{group}: it is chosen already; leave out the +"),
        (r"Ambiguous value for argument '([^']+)'", _several),
        (r"Error merging override (\S+?)=(.*)", lambda key, value: _wrong_type(key, value, text)),
    ):
        found = re.search(pattern, text)
        if found:
            return say(*found.groups())
    line = " ".join(text.split("\n")[0].split())
    place = re.search(r"full_key: (\S+)", text)
    return f"{place[1]}: {line}" if place else line


def refuse_added_keys(config: Any, schema: type, prefix: str = "") -> None:
    """Raise UserError for an attribute that is no field of its dataclass."""
    for name, value in vars(config).items():
        if name not in {field.name for field in fields(config)}:
            raise UserError(_unknown_key(prefix + name, schema))
        if is_dataclass(value):
            refuse_added_keys(value, schema, f"{prefix}{name}.")


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unknown_key(key: str, schema: type) -> str:
    known = [*all_keys(schema), *group_choices()]
    if key in known:
        return f"{key}: not in your configuration; begin it with `defaults: [train, _self_]`"
    same_name = [name for name in known if "." in name and name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    section = [name for name in known if name.startswith(key.rsplit(".", 1)[0] + ".")]
    close = difflib.get_close_matches(key, section or known, n=1, cutoff=0.75)
    hint = next(iter([*close, *same_name]), None)
    mend = f"did you mean {hint}?" if hint else "`fastgrpo train --help` lists every key"
    return f"{key}: no such key; {mend}"


def _unknown_choice(group: str, choice: str) -> str:
    options = group_choices().get(group, [])
    return f"{group}={choice}: no such choice; use one of {', '.join(options)}"


def _wrong_type(key: str, value: str, text: str) -> str:
    kinds = {
        "Integer": "a whole number",
        "Float": "a number",
        "bool": "true or false",
        "ListConfig": f"a list: [{value.strip()}]",
    }
    found = re.search(r"could not be converted to (\w+)|is not a valid (\w+)|is not a (ListConfig)", text)
    kind = kinds.get(next(filter(None, found.groups())), "") if found else ""
    key = key.lstrip("+")  # main.open_mapping puts them there
    return f"{key}={value.strip()}: wrong type; give {kind or 'a value as `fastgrpo train --help` shows'}"


def _several(override: str) -> str:
    return f"{override}: several values; add --multirun for a run with each, or write a list as KEY=[A,B]"


def _unreadable(override: str) -> str:
    return f"{override}: not understood; write KEY=VALUE, and quote a value with special characters: 'KEY=\"VALUE\"'"
