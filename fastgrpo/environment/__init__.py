"""Environments: what answers the policy's turns, by a function of the user's that runs outside the trainer's process.

    def respond(turn, answer):
        if answer in turn:
            return None  # the conversation is over
        return "No. Try again."

docs/environment.md has the whole contract. Worker processes import this package, so nothing is imported here.
"""
