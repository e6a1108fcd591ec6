"""Saving, cards, the hub, and the formats of others."""
