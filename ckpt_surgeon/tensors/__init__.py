"""What a tensor is: a place on disk, a view of one, or a value that is computed when it is written."""
