"""The ways a run can fail, and the exit code of each."""


class UserError(ValueError):
    """Something that the user provided cannot be used: exit code 2.

    The message says what is wrong, where (file, key or line) and what to do. No existing file was changed.
    """

    exit_code = 2


class DamagedFile(UserError):
    """A file is unreadable, too short, or fails its checksum.

    The message names the file and the damage; the caller adds the remedy, which depends on the file's purpose.
    """


class RunError(RuntimeError):
    """The run cannot continue (disk full, workers dying, scores not finite): exit code 1.

    The message says what happened, what is safe and how to continue.
    """

    exit_code = 1
