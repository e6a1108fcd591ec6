"""The doctor: what is said of a model is proved on it."""
