"""The method: captions, control map, losses, schedules, the objective of a step. Pure functions of text and tensors.

May import torch and each other, and nothing else of this package.
"""
