"""Errors that grip_hf raises on purpose."""


class GripError(Exception):
    """Base class of every error that grip_hf raises on purpose."""


class ConfigError(GripError, ValueError):
    """A setting has a value that is not allowed."""


class FileError(GripError, OSError):
    """A file cannot be written: no such folder, no permission, a full disk."""


class UnsupportedModelError(GripError, ValueError):
    """This model, or what it was asked to do, cannot be pruned by grip_hf."""


class NonFiniteScoreError(GripError, ValueError):
    """A selector gave NaN or infinity as the score of a real visual token."""


class ScorerError(GripError, ValueError):
    """A scorer is missing, damaged, or made for another model."""


class CacheError(GripError, RuntimeError):
    """A KV cache was asked for something that its pruned entries cannot give."""


class HubError(GripError, RuntimeError):
    """The Hub did not give or take something: no such repository, a wrong token, no connection, a strange file."""


class DatasetError(GripError, ValueError):
    """A dataset lacks what training needs; the message names the column or the row."""


class SourceError(GripError, ValueError):
    """A model cannot be loaded."""


class CheckpointError(GripError, ValueError):
    """A checkpoint does not fit what it is to go on with."""


class RewardError(GripError, ValueError):
    """A reward function returned something else than one finite number per completion."""
