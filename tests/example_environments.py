"""Environments that tests name by path."""


def echoes(turn, num_turns):
    """Says back how many characters were said, and ends the conversation after a turn of an odd number."""
    return None if len(turn) % 2 else f"<{len(turn)}/{num_turns}>"


def always(turn):
    return "go on"


def raises(turn):
    raise RuntimeError("out of order")


OPEN: dict[str, int] = {}


def counts(turn, conversation_id, num_turns):
    """Keeps state of its own for every conversation, until `counted` is asked for its reward."""
    if num_turns == 1:
        OPEN[conversation_id] = 0
    OPEN[conversation_id] += 1
    assert OPEN[conversation_id] == num_turns
    return None if len(turn) % 2 else "go on"


def counted(completions, conversation_ids):
    return [OPEN.pop(conversation_id, 0) for conversation_id in conversation_ids]
