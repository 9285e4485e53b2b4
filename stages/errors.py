"""The family of errors that a user, a disk or the data can cause in a stage; the command line prints their message."""


class StageError(Exception):
    """Something outside the program is wrong. The message says what, where, expected, got, and what to do."""


class SettingError(StageError, ValueError):
    """A config value that parses, but does not fit the target, the cache or the machine. The message names the key."""
