"""The user's functions: found by path, given what they ask for by parameter name, called where they can be killed.

Reward functions (fastgrpo/rewards) and environments (fastgrpo/environment) are made of these. Worker processes import
this package, so nothing here imports torch.
"""
