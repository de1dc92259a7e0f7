"""
The shapes dataset, drawn.
"""
import numpy as np


def draw_shape(i, size=32, seed=0):
    """Image i, (3, size, size) uint8, of class i % 10: one bright shape of random colour, place, size and
    angle on a background that shades from one dark colour to another. A function of (i, size, seed)."""
    rng = np.random.Generator(np.random.Philox(key=[seed, i]))
    scale, angle = rng.uniform(0.32, 0.44), rng.uniform(-np.pi / 6, np.pi / 6)
    cx, cy = rng.uniform(scale, 1 - scale, 2)
    pixels = (np.arange(size) + 0.5) / size
    X, Y = np.meshgrid(pixels, pixels)
    x, y = (X - cx) / scale, (Y - cy) / scale
    x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    ink = np.clip(0.5 - [*SHAPES.values()][i % 10](x, y) * scale * size, 0, 1)  # one pixel of soft edge

    near, far = rng.uniform(0, 0.45, (2, 3, 1, 1))
    colour, turn = rng.uniform(0.5, 1, (3, 1, 1)), rng.uniform(0, 2 * np.pi)
    slope = np.clip(0.5 + (X - 0.5) * np.cos(turn) + (Y - 0.5) * np.sin(turn), 0, 1)
    background = near * (1 - slope) + far * slope
    return np.round(255 * (background * (1 - ink) + colour * ink)).astype(np.uint8)


def star(x, y):
    """One tip's edge, folded five times."""
    r, a = np.hypot(x, y), np.abs(np.mod(np.arctan2(y, x), 2 * np.pi / 5) - np.pi / 5)      # a: pi/5 at a tip, 0 in a notch
    px, py = r * np.cos(np.pi / 5 - a), r * np.sin(np.pi / 5 - a)
    edge = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)]) - [1, 0]                 # from the tip to the notch
    return ((px - 1) * edge[1] - py * edge[0]) / np.hypot(*edge)


along = lambda x, y, angle: x * np.cos(angle) + y * np.sin(angle)            # one direction


box = lambda x, y, a, b: np.maximum(np.abs(x) - a, np.abs(y) - b)


SHAPES = {  # about the distance of (x, y) to a shape's edge, negative inside; each shape reaches about 1 from the origin
    "disk": lambda x, y: np.hypot(x, y) - 0.85,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.2,
    "half disk": lambda x, y: np.maximum(np.hypot(x, y + 0.4) - 1, -0.4 - y),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.8 - np.hypot(x - 0.45, y)),
    "square": lambda x, y: box(x, y, 0.75, 0.75),
    "bar": lambda x, y: box(x, y, 1, 0.3),
    "triangle": lambda x, y: np.max([along(x, y, 2 * np.pi * j / 3) for j in range(3)], axis=0) - 0.5,
    "star": star,
    "cross": lambda x, y: np.minimum(box(x, y, 1, 0.28), box(x, y, 0.28, 1)),
    "arrow": lambda x, y: np.minimum(box(x + 0.5, y, 0.5, 0.22), np.maximum(                # its shaft and its head
        -x, np.maximum(along(x, y, np.pi / 4), along(x, y, -np.pi / 4)) - 0.68))}
