"""The inert pickle machine, and the objects that it builds without importing anything."""
