"""Containers: one module for each, reading and writing."""
