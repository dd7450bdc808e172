"""From a file to a Checkpoint, and what can be said of it."""
