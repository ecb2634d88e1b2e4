"""What the user can put right, and what passes."""


class InputError(ValueError):
    """Bad input: one sentence a line, each naming the key, file or tensor and the remedy."""


class TemporaryFailure(RuntimeError):
    """What is no fault of the input: a sentence that says what happened; the same command goes on afterwards."""
