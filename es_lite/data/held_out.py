"""How much of the items is held out for evaluations. Loads neither numpy nor torch: graders import it."""

import math

from es_lite.errors import UserError


def held_out_count(total: int, fraction: float, what: str) -> int:
    """How many of `total` items, the last ones, are held out: this fraction, rounded up. Raises UserError if none is left.

    what: the items' name, in the plural.
    """
    count = math.ceil(round(total * fraction, 6))  # 100 * 0.07 is 7.000000000000001
    if fraction > 0:
        count = max(1, count)
    if count >= total:
        own = "a text of its own" if what == "samples" else "a file of their own"
        more = "text" if what == "samples" else what
        raise UserError(
            f"eval.fraction = {fraction}: holds out all of the {total} {what}, which leaves none to train on; take a smaller "
            f"fraction, more {more}, or {own} for eval.path"
        )
    return count
