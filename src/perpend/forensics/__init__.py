"""What was done to a model: told from its weights alone."""
