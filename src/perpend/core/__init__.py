"""Importable mathematics of directional ablation: torch tensors in, torch tensors out, no model and no file format."""
