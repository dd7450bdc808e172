"""A checkpoint and a model: do they fit, and how can they be made to."""
