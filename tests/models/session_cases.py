"""Prompts of uneven length, for what must not depend on how they are put together."""

from perpend.data import Prompt

PROMPTS = [
    Prompt("How do I sort a list of numbers in Python?"),
    Prompt("Sure?"),
    Prompt("Write a short story about a fox that learns to read, and tell me what it means for the village."),
    Prompt("What is the capital of France?"),
    Prompt("Explain how to bake a loaf of bread with flour, water, salt and yeast."),
]
