"""Parses sizes, and puts durations and counts into words."""

import re

GIB = 2**30

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of "8 GiB", "512MiB", "2 GB" or "1000000"; 0 if it is not a size."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        return 0
    try:
        return int(float(match[1]) * _UNITS[match[2].upper()])
    except (ValueError, OverflowError):
        return 0


def duration(seconds: float) -> str:
    """An approximate duration: "less than 0.1 s", "0.4 s", "38 s", "2 min 20 s", "12 min", "3 h 20 min", "2 days 4 h"."""
    if seconds < 0.1:
        return "less than 0.1 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 600:
        minutes, rest = divmod(round(seconds, -1), 60)
        return f"{minutes:.0f} min {rest:.0f} s" if rest else f"{minutes:.0f} min"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if hours else f"{days} days"


def count(number: int, noun: str) -> str:
    """ "1 step", "2 steps", "3 passes"."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"
