"""The one error of files that are not what they should be."""

from __future__ import annotations

from fasthyp._unpickling import UnreadableFile


class ModelFileError(UnreadableFile):
    """A model or regressor file that cannot be read; says the file, the array and what is wrong."""
