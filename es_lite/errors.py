"""The ways a run can fail, and the exit code of each."""


class UserError(ValueError):
    """Something that the user provided cannot be used: exit code 2.

    The message says what is wrong, where (file, key or line) and what to do. Nothing that existed was changed.
    """

    exit_code = 2


class DamagedFile(UserError):
    """A file that es_lite wrote or was given is unreadable, too short, or not what was written.

    The message names the file and what is wrong with it. What to do about it depends on who reads the file, so the caller
    adds that.
    """


class RunError(RuntimeError):
    """The run cannot continue (disk full, workers dying, scores not finite): exit code 1.

    The message says what happened, what is safe and which command continues from there.
    """

    exit_code = 1
