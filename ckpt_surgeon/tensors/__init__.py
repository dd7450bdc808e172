"""What a tensor is (a place on disk, a view of one, or a value computed when it is written), and all arithmetic."""
