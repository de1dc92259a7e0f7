"""
The shapes dataset, drawn: draw_shape(i) is image i.

Each shape is a function of x and y that gives about the distance of a point to the shape's edge,
negative inside. A shape lies around the origin and reaches about 1 from it; y points down.
"""

import numpy as np


def draw_shape(i, size=32, seed=0):
    """Image i, (3, size, size) uint8, of class i % 10. A function of (i, size, seed).

    One bright shape of random colour, place, size and angle, on a background that shades from one
    dark colour to another.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, i]))
    scale = rng.uniform(0.32, 0.44)  # of the image's side
    angle = rng.uniform(-np.pi / 6, np.pi / 6)
    centre_x, centre_y = rng.uniform(scale, 1 - scale, 2)
    pixels = (np.arange(size) + 0.5) / size
    X, Y = np.meshgrid(pixels, pixels)  # (size, size), from 0 to 1

    x, y = (X - centre_x) / scale, (Y - centre_y) / scale
    x, y = along(x, y, angle), np.cos(angle) * y - np.sin(angle) * x
    shape = list(SHAPES.values())[i % 10]
    ink = np.clip(0.5 - shape(x, y) * scale * size, 0, 1)  # its edge is one pixel wide

    near, far = rng.uniform(0, 0.45, (2, 3, 1, 1))
    colour = rng.uniform(0.5, 1, (3, 1, 1))
    turn = rng.uniform(0, 2 * np.pi)
    slope = np.clip(0.5 + (X - 0.5) * np.cos(turn) + (Y - 0.5) * np.sin(turn), 0, 1)
    background = near * (1 - slope) + far * slope
    image = background * (1 - ink) + colour * ink
    return np.round(255 * image).astype(np.uint8)


def along(x, y, angle):
    """How far (x, y) lies in one direction."""
    return x * np.cos(angle) + y * np.sin(angle)


def box(x, y, half_width, half_height):
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def disk(x, y):
    return np.hypot(x, y) - 0.85


def ring(x, y):
    return np.abs(np.hypot(x, y) - 0.72) - 0.2


def half_disk(x, y):
    return np.maximum(np.hypot(x, y + 0.4) - 1, -0.4 - y)


def crescent(x, y):
    return np.maximum(np.hypot(x, y) - 0.95, 0.8 - np.hypot(x - 0.45, y))


def square(x, y):
    return box(x, y, 0.75, 0.75)


def bar(x, y):
    return box(x, y, 1, 0.3)


def triangle(x, y):
    sides = [along(x, y, 2 * np.pi * side / 3) for side in range(3)]
    return np.max(sides, axis=0) - 0.5


def star(x, y):
    """One tip's edge, folded five times."""
    radius = np.hypot(x, y)
    turn = np.mod(np.arctan2(y, x), 2 * np.pi / 5)
    from_notch = np.abs(turn - np.pi / 5)  # pi/5 at a tip, 0 in a notch
    folded_x = radius * np.cos(np.pi / 5 - from_notch)
    folded_y = radius * np.sin(np.pi / 5 - from_notch)
    tip = [1, 0]
    notch = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    edge = notch - tip
    return ((folded_x - 1) * edge[1] - folded_y * edge[0]) / np.hypot(*edge)


def cross(x, y):
    return np.minimum(box(x, y, 1, 0.28), box(x, y, 0.28, 1))


def arrow(x, y):
    shaft = box(x + 0.5, y, 0.5, 0.22)
    upper, lower = along(x, y, np.pi / 4), along(x, y, -np.pi / 4)
    head = np.maximum(-x, np.maximum(upper, lower) - 0.68)
    return np.minimum(shaft, head)


SHAPES = {
    "disk": disk,
    "ring": ring,
    "half disk": half_disk,
    "crescent": crescent,
    "square": square,
    "bar": bar,
    "triangle": triangle,
    "star": star,
    "cross": cross,
    "arrow": arrow,
}
