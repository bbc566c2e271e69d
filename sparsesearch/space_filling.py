"""A Hilbert-like path through a box of any size.

A box is spanned by three signed vectors along the axes; the path enters at the corner `start` and leaves at the far end of the first vector.
It is cut into two, three or five boxes whose paths join end to end, down to single rows. Source: Cerveny 2018, gilbert, generalised Hilbert
curves; the cuts are those of its 3-D case, written here as a work list.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

Vector = tuple[int, int, int]
Box = tuple[Vector, Vector, Vector, Vector]


@lru_cache(maxsize=16)
def gilbert_path(shape: tuple[int, int, int]) -> Int[Tensor, "T 3"]:
    """Every cell of the box once, as (frame, row, column); consecutive cells are neighbours wherever the sizes allow it."""
    longest_first = sorted(range(3), key=lambda axis: (-shape[axis], -axis))
    spans = [_unit(axis, shape[axis]) for axis in longest_first]
    rows, todo = [], [((0, 0, 0), spans[0], spans[1], spans[2])]
    while todo:
        start, *sides = box = todo.pop()
        lengths = [_length(side) for side in sides]
        if 0 in lengths:
            continue
        if sum(length > 1 for length in lengths) <= 1:
            longest = int(np.argmax(lengths))
            rows.append(np.array(start) + np.arange(lengths[longest])[:, None] * np.sign(sides[longest]))
        else:
            todo.extend(reversed(_cut(box)))
    return torch.from_numpy(np.concatenate(rows))


def _cut(box: Box) -> list[Box]:
    """The smaller boxes, in the order the path visits them."""
    p, a, b, c = box
    w, h, d = _length(a), _length(b), _length(c)
    a2, b2, c2 = _half(a), _half(b), _half(c)
    a_rest, b_rest, c_rest = _minus(a, a2), _minus(b, b2), _minus(c, c2)
    a_last, c_last = _minus(a, _sign(a)), _minus(c, _sign(c))
    b2_last, c2_last = _minus(b2, _sign(b)), _minus(c2, _sign(c))
    if 2 * w > 3 * h and 2 * w > 3 * d:
        return [(p, a2, b, c), (_plus(p, a2), a_rest, b, c)]
    if 3 * h > 4 * d:
        return [
            (p, b2, c, a2),
            (_plus(p, b2), a, b_rest, c),
            (_plus(p, a_last, b2_last), _negative(b2), c, _negative(a_rest)),
        ]
    if 3 * d > 4 * h:
        return [
            (p, c2, a2, b),
            (_plus(p, c2), a, b, c_rest),
            (_plus(p, a_last, c2_last), _negative(c2), _negative(a_rest), b),
        ]
    return [
        (p, b2, c2, a2),
        (_plus(p, b2), c, a2, b_rest),
        (_plus(p, b2_last, c_last), a, _negative(b2), _negative(c_rest)),
        (_plus(p, a_last, b2, c_last), _negative(c), _negative(a_rest), b_rest),
        (_plus(p, a_last, b2_last), _negative(b2), c2, _negative(a_rest)),
    ]


def _unit(axis: int, length: int) -> Vector:
    x, y, z = (length if place == axis else 0 for place in range(3))
    return x, y, z


def _length(v: Vector) -> int:
    return abs(v[0] + v[1] + v[2])


def _sign(v: Vector) -> Vector:
    return int(np.sign(v[0])), int(np.sign(v[1])), int(np.sign(v[2]))


def _half(v: Vector) -> Vector:
    """Half of a vector, an even number of steps where there is room, so that the pieces' ends meet."""
    length, sign = _length(v), _sign(v)
    steps = length // 2 + (1 if length // 2 % 2 and length > 2 else 0)
    return sign[0] * steps, sign[1] * steps, sign[2] * steps


def _plus(*vectors: Vector) -> Vector:
    return sum(v[0] for v in vectors), sum(v[1] for v in vectors), sum(v[2] for v in vectors)


def _minus(v: Vector, w: Vector) -> Vector:
    return v[0] - w[0], v[1] - w[1], v[2] - w[2]


def _negative(v: Vector) -> Vector:
    return -v[0], -v[1], -v[2]
