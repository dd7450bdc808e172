"""A model before it is trained: what is frozen, grouped, initialised."""
