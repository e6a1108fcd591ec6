"""Where heads look: scores and patterns re-weighted."""
