"""Memory against context, and dated facts."""
