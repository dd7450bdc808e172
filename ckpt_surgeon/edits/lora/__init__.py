"""Low-rank adapters: what their files say, the tensors of a base that they add to, and the formula of each kind.

``layers`` reads the names of an adapter's tensors, ``settings`` what is stated beside them, ``places`` finds the base's
keys, ``formulas`` has the arithmetic, ``merging`` and ``extracting`` are the edits.
"""
