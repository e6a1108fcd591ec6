"""Calls of attention, by either way in, and their rows and statistics."""
