"""Checkpoint formats: what lies on disk, opened as plain tensors."""
