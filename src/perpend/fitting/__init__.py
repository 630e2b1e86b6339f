"""From prompts to an edit: what the model does by itself, its directions, the layer that serves best, the edit."""
