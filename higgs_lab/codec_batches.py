"""Which clips share a pass of the codec, and how long it is: on a GPU its shapes shall be few."""

from __future__ import annotations

from collections.abc import Iterator


def rounded(length: int, second: int) -> int:
    """length up to whole seconds, from 16 s on by an eighth of it at most; second 0: as it is.

    cuDNN plans every new shape, which takes it longer than the work on it: few may come.
    """
    if not second:
        return length
    step = _step(length, second)
    return -(-length // step) * step


def _step(length: int, second: int) -> int:
    """What `rounded` rounds to."""
    return second << max(0, (length // second).bit_length() - 4)


def batches(
    by_length: dict[int, list[int]],
    max_length: int,
    ragged: bool,
    second: int = 0,
    fill: bool = False,
) -> Iterator[list[int]]:
    """Indices that go together, of one length or, ragged, of neighbouring ones.

    As many as max_length holds, padding included; where lengths are `rounded` 1, 2, 4, 8 and so on,
    or, if the number will be filled up to a `rounded` one, as many as that one may be.
    """
    groups = [by_length[length] for length in sorted(by_length, reverse=True)]
    if ragged:
        groups = [[i for group in groups for i in group]]
    length = {i: n for n, members in by_length.items() for i in members}
    for group in groups:
        while group:  # the first is the longest
            most = max(1, max_length // rounded(length[group[0]], second))
            if fill:
                most -= most % _step(most, 1)
            size = min(len(group), most)
            if second and not fill:
                size = 1 << size.bit_length() - 1
            yield group[:size]
            group = group[size:]
