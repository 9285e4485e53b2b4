"""Every error that a user or a disk can cause in this package.

Each class is a ``CacheError`` and also the builtin that fits it, so that a caller may catch either.
A message says what is wrong, where (file, shard, sample), what was expected, what was found, and what to do.
"""


class CacheError(Exception):
    """Anything that is wrong with a cache or with the use of one."""


class CacheNotFoundError(CacheError, FileNotFoundError):
    """There is no cache at the path."""


class CacheExistsError(CacheError, FileExistsError):
    """The directory already holds something that a new plan would have to overwrite."""


class CacheFormatError(CacheError, ValueError):
    """The files are not of a format version, or not of a form, that this code reads."""


class CacheIdentityError(CacheError, ValueError):
    """The cache was made from other inputs than the ones asked for."""


class CacheUsageError(CacheError, ValueError):
    """A caller handed over something that does not fit the plan."""


class CacheBusyError(CacheError, RuntimeError):
    """Another writer holds this shard, or has committed it meanwhile: go on with the next one."""


class CacheCorruptError(CacheError, OSError):
    """Bytes on disk are not the ones that were committed."""


class CacheReadError(CacheError, OSError):
    """The operating system refused to read a file of the cache."""


class CacheIncompleteError(CacheError, RuntimeError):
    """Planned shards have no commit yet."""


class CacheWriteError(CacheError, OSError):
    """The operating system refused to write or to remove a file of the cache."""


class CacheSpaceError(CacheError, OSError):
    """The disk or the quota is full."""
