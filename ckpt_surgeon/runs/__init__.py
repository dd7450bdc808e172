"""A whole training checkpoint: its state_dicts, its optimizers, and what follows an edit of the weights."""
