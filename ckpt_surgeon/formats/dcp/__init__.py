"""torch's distributed checkpoints: folders of pieces with a .metadata."""
