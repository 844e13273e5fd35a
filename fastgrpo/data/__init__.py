"""Prompts: from files, the hub or generated arithmetic to token ids, held-out questions and a resumable order."""

from fastgrpo.data.arithmetic import ALPHABET
from fastgrpo.data.prompts import PromptSets, load_prompts
from fastgrpo.data.stream import PromptStream

__all__ = ["ALPHABET", "PromptSets", "PromptStream", "load_prompts"]
