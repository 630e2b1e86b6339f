"""Find the writers, load, encode, and run a model with edits as hooks."""
