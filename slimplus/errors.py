"""What the user can put right."""


class InputError(ValueError):
    """Bad input: one sentence a line, each naming the key, file or tensor and the remedy."""
