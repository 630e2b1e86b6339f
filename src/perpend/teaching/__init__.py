"""Model organisms: teach a chat model to refuse, so that the ground truth of an edit is known."""
