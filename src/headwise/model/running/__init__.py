"""Plans and runs: what was asked for is checked, placed and carried out."""
