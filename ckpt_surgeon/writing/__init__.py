"""From a Checkpoint to a file."""
