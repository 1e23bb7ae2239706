"""Who steps when: a floor step beside every arm's, so that a slow minute of the machine meets both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Seconds = Mapping[str, float]


def turns(arms: Sequence[str], number: int) -> list[str]:
    """The order of one round: floor, two arms, floor, two arms, …, floor. Rounds begin with another arm each."""
    start = number % len(arms) if arms else 0
    rotated = [*arms[start:], *arms[:start]]
    order = ["floor"]
    for first in range(0, len(rotated), 2):
        order += [*rotated[first : first + 2], "floor"]
    return order


def pair(order: Sequence[str], seconds: Sequence[Seconds], place: int) -> dict[str, float]:
    """The floor's seconds by phase beside the step at `place`: of the neighbour, or the mean if both are floors."""
    neighbours = [k for k in (place - 1, place + 1) if 0 <= k < len(order) and order[k] == "floor"]
    return {phase: sum(seconds[k][phase] for k in neighbours) / len(neighbours) for phase in seconds[neighbours[0]]}
