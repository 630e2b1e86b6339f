"""The options that commands share: one table, from which the flags and the keywords of the functions follow."""
