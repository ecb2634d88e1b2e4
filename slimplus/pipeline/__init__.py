"""The stages of a run, from a recipe to a packed checkpoint, and what they share."""
