"""Judges: a word list, sequence classifiers, and the panel that lets neither speak alone."""
