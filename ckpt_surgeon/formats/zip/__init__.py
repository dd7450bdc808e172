"""Containers that are zip archives."""
