"""Which edit removes the most for the least: candidates, their trials, the front, the choice."""
