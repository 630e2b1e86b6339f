"""The command line: one file per command, one output, one table of errors."""
