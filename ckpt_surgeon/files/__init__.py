"""Bytes: files of this machine and at URLs, spans of them, and how they are written and replaced."""
