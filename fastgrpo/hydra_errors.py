"""Hydra's and OmegaConf's errors in one line: the key, the value, the mend."""

from __future__ import annotations

import difflib
import re

from fastgrpo.help import all_keys, group_choices


def explain(error: BaseException) -> str:
    """One line for whatever the composition of a configuration raises."""
    chain = list(_chain(error))
    text = "\n".join(str(link) for link in chain)
    for pattern, say in (
        (r"Could not override '([^']+)'", _unknown_key),
        (r"Key '([^']+)' not in '[^']+'[\s\S]*?full_key: (\S+)", lambda _, full: _unknown_key(full)),
        (r"Could not find '([\w]+)/([^']+)'", _unknown_choice),
        (r"Error merging override (\S+?)=(.*)", lambda key, value: _wrong_type(key, value, text)),
    ):
        found = re.search(pattern, text)
        if found:
            return say(*found.groups())
    return " ".join(text.split("\n")[0].split())


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unknown_key(key: str) -> str:
    groups = group_choices()
    close = difflib.get_close_matches(key, [*all_keys(), *groups], n=1, cutoff=0.6)
    last = key.rsplit(".", 1)[-1]
    same_name = [known for known in all_keys() if known.rsplit(".", 1)[-1] == last]
    hint = (same_name or close or [None])[0]
    mend = f"did you mean {hint}?" if hint else "`fastgrpo train --help` lists every key"
    return f"{key}: no such key; {mend}"


def _unknown_choice(group: str, choice: str) -> str:
    options = group_choices().get(group, [])
    return f"{group}={choice}: no such choice; use one of {', '.join(options)}"


def _wrong_type(key: str, value: str, text: str) -> str:
    found = re.search(r"could not be converted to (\w+)|'(\w+)' is not a primitive|type '(\w+)'", text)
    kinds = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
    kind = next((part for part in found.groups() if part), "") if found else ""
    return f"{key}={value.strip()}: wrong type; give {kinds.get(kind, 'a value as fastgrpo train --help shows')}"
