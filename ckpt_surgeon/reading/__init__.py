"""From a file to a Checkpoint, and what its values are."""
