"""Edits: a mapping of tensors in, a change out."""
