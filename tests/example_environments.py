"""Environments that tests name by path."""


def echoes(turn, num_turns):
    """Says back how many characters were said, and ends the conversation after a turn of an odd number."""
    return None if len(turn) % 2 else f"<{len(turn)}/{num_turns}>"


def always(turn):
    return "go on"


def raises(turn):
    raise RuntimeError("out of order")
