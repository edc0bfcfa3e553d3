"""What a line tells a user, whatever words stand between.

One test has each kind of line whole. The others name what their own case puts in: the place, what is, how to mend it.
"""

from __future__ import annotations


def tells(line: str, *parts: object) -> bool:
    """Whether it is one line that has the parts, in this order.

    Raises:
        AssertionError: it has not, with the first that is not where it must be.
    """
    assert "\n" not in line.strip(), line
    start = 0
    for part in map(str, parts):
        found = line.find(part, start)
        assert found >= 0, f"{part!r} is not behind {line[:start]!r} in {line!r}"
        start = found + len(part)
    return True
