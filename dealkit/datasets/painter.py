"""How a bird of Birdworld is painted: reproducible to the last bit, sixteen at a time.

Every random number is a hash of (seed, split, index, draw), and the painter uses only operations that IEEE 754 rounds
exactly (+, -, *, /, comparisons): no sine, no BLAS, no sums over pixels. That is why the same (seed, split, index,
size) gives the same bytes on every machine, Python and NumPy. Each pixel shows exactly one thing, so the masks are the
very map that the image is painted from.
"""
from __future__ import annotations

import numpy as np

PARTS = ("head", "wing", "belly", "tail", "beak")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
BACKGROUNDS = ("land", "water")
SPLITS = ("pretrain", "train", "validation", "test")    # the order is part of every image's key

_COLOUR_RGB = np.array([[.86, .14, .14], [.96, .55, .10], [.95, .87, .20],
                        [.16, .66, .24], [.16, .28, .86], [.56, .20, .72]], np.float32)
_BACKGROUND_RGB = np.array([[.64, .54, .40], [.45, .58, .64]], np.float32)
EYE, _LEGS, _FIRST_BLOB, _BLOBS = 6, 7, 8, 5          # codes of the layer map; 0 is background, 1..5 the parts
_DRAWS, _GRID = 96, 11                                 # scalars per image; side of the coarse texture grid


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): uint64 -> well-mixed uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def image_keys(seed: int, split: str, indices: np.ndarray) -> np.ndarray:
    code = np.array([SPLITS.index(split) + 1], np.uint64)      # the split is part of the key: streams are disjoint
    root = _mix(_mix(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15)) + code)
    return _mix(root + np.asarray(indices, np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _bits(keys: np.ndarray, n: int, stream: int) -> np.ndarray:
    steps = (np.arange(n, dtype=np.uint64) + np.uint64(stream << 32)) * np.uint64(0xD1342543DE82EF95)
    return _mix(keys[:, None] + steps)


def uniforms(keys: np.ndarray, n: int = _DRAWS, stream: int = 1) -> np.ndarray:
    """[B] keys -> [B, n] float32 in [0, 1), multiples of 2^-24, so exact in float32."""
    return (_bits(keys, n, stream) >> np.uint64(40)).astype(np.float32) * np.float32(2 ** -24)


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return (np.float32(low) + u * np.float32(high - low))[:, None, None]


def _rotate(x, y, t):
    """Rotate by the angle 2 atan(t): rational in t, hence exact where a sine would not be."""
    d = 1 + t * t
    c, s = (1 - t * t) / d, (2 * t) / d
    return c * x + s * y, c * y - s * x


def _ellipse(x, y, a, b):
    x, y = x / np.asarray(a, np.float32), y / np.asarray(b, np.float32)
    return x * x + y * y < 1


def _layers(u: np.ndarray, size: int) -> np.ndarray:
    """[B, draws] uniforms -> [B, size, size] uint8: which thing each pixel shows. Lengths in 1/80 of the image."""
    axis = (np.arange(size, dtype=np.float32) + np.float32(.5)) * np.float32(80 / size) - np.float32(40)
    px, py = axis[None, None, :], axis[None, :, None]
    layer = np.zeros((len(u), size, size), np.uint8)
    for blob in range(_BLOBS):                                          # distractors lie behind the bird
        v = u[:, 20 + 8 * blob:28 + 8 * blob]
        x, y = _rotate(px - _between(v[:, 0], -38, 38), py - _between(v[:, 1], -38, 38), _between(v[:, 2], -1, 1))
        inside = _ellipse(x, y, _between(v[:, 3], 3, 8), _between(v[:, 4], 3, 8))
        layer[inside & (v[:, 5] < .8)[:, None, None]] = _FIRST_BLOB + blob
    # the bird's own frame: shift, scale, tilt, mirror
    x, y = px - _between(u[:, 0], -5, 5), py - _between(u[:, 1], -4, 6)
    flip, scale = np.where(u[:, 2] < .5, np.float32(-1), np.float32(1))[:, None, None], _between(u[:, 3], .8, 1.08)
    x, y = _rotate(x * flip / scale, y / scale, _between(u[:, 4], -.12, .12))
    legs = (y > 8) & (y < 23) & ((np.abs(x + 4) < 1) | (np.abs(x - 3) < 1))
    layer[legs] = _LEGS
    tx, ty = _rotate(-(x + 13), y - 1, _between(u[:, 5], -.05, .22))     # tail: a fan that opens backwards
    layer[(tx > 0) & (tx < 19) & (np.abs(ty) < np.float32(3) + tx * np.float32(.24))] = 1 + PARTS.index("tail")
    layer[_ellipse(x, y - 2, 18, 12)] = 1 + PARTS.index("belly")
    wx, wy = _rotate(x + 3, y + 3 + _between(u[:, 6], -1, 1), _between(u[:, 7], -.2, .1))
    layer[_ellipse(wx, wy, 12.5, 6.5)] = 1 + PARTS.index("wing")
    hx, hy = x - 17 - _between(u[:, 8], -1, 2), y + 12 + _between(u[:, 9], -2, 2)
    bx, by = _rotate(hx - 6, hy - 1, _between(u[:, 10], -.12, .12))      # beak: a triangle, its base under the head
    layer[(bx > 0) & (bx < 17) & (np.abs(by) < (17 - bx) * np.float32(.48))] = 1 + PARTS.index("beak")
    layer[_ellipse(hx, hy, 9, 9)] = 1 + PARTS.index("head")
    layer[_ellipse(hx - 3, hy + 2.5, 1.6, 1.6)] = EYE
    return layer


def _texture(keys: np.ndarray, size: int) -> np.ndarray:
    """[B, size, size] in [0, 1): a coarse random grid, interpolated."""
    grid = uniforms(keys, _GRID * _GRID, stream=2).reshape(-1, _GRID, _GRID)
    position = np.arange(size, dtype=np.float32) * np.float32((_GRID - 1) / size)
    low = position.astype(np.int64)
    f = position - low
    rows = grid[:, low] * (1 - f)[:, None] + grid[:, low + 1] * f[:, None]
    return rows[:, :, low] * (1 - f) + rows[:, :, low + 1] * f


def render(seed: int, split: str, indices, attributes: np.ndarray, backgrounds: np.ndarray, size: int = 80):
    """Paint a batch of birds.

    Args:
        seed, split, indices: the key of each image's pose, light, texture, noise and distractors; indices is [B].
        attributes: [B, 5] int, the colour of each part (index into COLOURS), parts in the order of PARTS.
        backgrounds: [B] int, 0 land, 1 water.
        size: side in pixels, 64 to 256, a multiple of 8.

    Returns:
        images [B, size, size, 3] uint8 and layers [B, size, size] uint8, where 1..5 are the visible pixels of PARTS,
        6 the eye (part of the head), 7 the legs, 8.. distractors, 0 the background.
    """
    indices, attributes = np.asarray(indices), np.asarray(attributes)
    images, layers = [], []
    for i in range(0, len(indices), 16):                                # 16 images at a time stay in the CPU's cache
        key = image_keys(seed, split, indices[i:i + 16])
        image, layer = _paint(key, attributes[i:i + 16], np.asarray(backgrounds)[i:i + 16], size)
        images.append(image)
        layers.append(layer)
    return np.concatenate(images), np.concatenate(layers)


def _paint(keys, attributes, backgrounds, size):
    u, b = uniforms(keys), len(keys)
    layer = _layers(u, size)
    palette = np.full((b, _FIRST_BLOB + _BLOBS, 4), .12, np.float32)    # r, g, b, strength of the texture
    palette[:, 0, :3] = _BACKGROUND_RGB[backgrounds] + (u[:, 11:14] - np.float32(.5)) * np.float32(.14)
    palette[:, 0, 3] = .45
    jitter = (uniforms(keys, 3 * (5 + _BLOBS), stream=4).reshape(b, -1, 3) - np.float32(.5)) * np.float32(.12)
    palette[:, 1:6, :3] = _COLOUR_RGB[attributes] + jitter[:, :5]
    palette[:, 1:6, 3] = .3
    blob = (u[:, 60:60 + _BLOBS] * np.float32(len(COLOURS))).astype(np.int64)
    palette[:, _FIRST_BLOB:, :3] = _COLOUR_RGB[blob] + jitter[:, 5:]
    palette[:, _FIRST_BLOB:, 3] = .3
    light = _between(u[:, 14], .75, 1.1) + (u[:, 15:18] - np.float32(.5))[:, None] * np.float32(.1)
    palette[:, :, :3] *= light                                          # [B, 1, 3]: brightness and a slight tint
    colour = palette.reshape(-1, 4)[layer + (np.arange(b) * palette.shape[1])[:, None, None]]
    texture = _texture(keys, size) - np.float32(.5)
    # water carries ripples: a triangle wave of the row, bent by the texture
    phase = np.arange(size, dtype=np.float32)[None, :, None] * np.float32(80 / size / 7) + texture * np.float32(1.6)
    ripple = (np.abs(phase - np.floor(phase) - np.float32(.5)) - np.float32(.25)) * np.float32(.6)
    texture = texture + ripple * ((layer == 0) & (backgrounds == 1)[:, None, None])
    noise = _bits(keys, size * size // 8, stream=3).astype("<u8").view(np.uint8).reshape(b, size, size)
    noise = (noise.astype(np.float32) - np.float32(127.5)) * np.float32(.08 / 255)
    image = colour[..., :3] * (1 + colour[..., 3:] * texture[..., None]) + noise[..., None]
    return np.floor(np.clip(image, 0, 1) * np.float32(255) + np.float32(.5)).astype(np.uint8), layer
