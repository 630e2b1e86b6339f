"""A model and its edit in one memory: to talk to, from a terminal, over HTTP, in a browser."""
