"""Directions in what heads write, found or fitted."""
