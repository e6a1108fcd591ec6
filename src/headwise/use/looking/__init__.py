"""Where heads look in pictures, and what is done with the heads that do."""
