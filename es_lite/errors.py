"""The two ways a run ends badly, and the exit code of each."""


class UserError(ValueError):
    """Something the user gave cannot be used: exit code 2.

    The message says what, where (file, key or line) and what to do. Nothing that existed was changed.
    """

    exit_code = 2


class RunError(RuntimeError):
    """The run cannot go on (disk full, workers dying, scores not finite): exit code 1.

    The message says what happened, what is safe and which command goes on from there.
    """

    exit_code = 1
