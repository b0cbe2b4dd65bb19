"""Words and tables for people. Anything that somebody else may have chosen goes through ``escape`` (T19)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34"}
_STATUS_COLOURS = {
    "COMPLETED": "green", "FAILED": "red", "TIMED_OUT": "red", "CANCELLED": "yellow", "IN_PROGRESS": "blue",
    "BUSY": "blue", "IDLE": "green", "ENDING": "yellow",
}  # fmt: skip


def escape(text: str) -> str:
    """Control characters, bidirectional overrides and invisible ones become visible; lines stay lines."""
    return "\n".join(_escape_line(line) for line in text.split("\n"))


def _escape_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def cell(text: object, width: int = 40) -> str:
    """One line of at most ``width`` characters."""
    shown = _escape_line(str(text).replace("\n", " "))
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def has_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str) -> str:
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if colour and has_colours() else text


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned lines; the last column is as long as it is. Cells must be escaped already."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    shown = []
    for number, line in enumerate(lines):
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        padded = padded if number else [paint(text, "bold") for text in padded]
        shown.append("  ".join(paint(text, _STATUS_COLOURS.get(text.strip(), "")) for text in padded).rstrip())
    return shown


def size(count: int | None) -> str:
    if count is None:
        return "?"
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError("unreachable")


def user_name(uid: int) -> str:
    """Who that is on this host."""
    import pwd

    try:
        return cell(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return f"uid {uid}"


def duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def print_json(document: object) -> None:
    import json

    print(json.dumps(document, indent=2, sort_keys=True))


def print_json_line(document: object) -> None:
    """One of several documents: a line each, so that a reader need not wait for the last."""
    import json

    print(json.dumps(document, sort_keys=True), flush=True)


def short(job_id: str) -> str:
    """Enough of an id to type."""
    return job_id[:10]
