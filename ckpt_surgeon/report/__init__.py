"""Records as text and JSON; nothing here prints."""
