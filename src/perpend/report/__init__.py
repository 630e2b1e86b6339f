"""The report of a result: a schema for its JSON, and one page that shows it."""
