"""The one error of files that are not what they should be."""

from __future__ import annotations

_LONGEST = 900


class ModelFileError(ValueError):
    """A model or regressor file that cannot be read; says the file, the array and what is wrong."""

    def __init__(self, message: str) -> None:
        # what a file names, and so puts into a message, may be as long as the file
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}...")
