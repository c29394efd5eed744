"""Demonstration data: procedural "photographs", and such scenes after an upsampling decoder.

Real: a scene (power-law texture, gradients, shapes with sharp and soft edges, several materials) drawn at native
resolution, plus sensor noise that is independent from pixel to pixel. Fake: a scene from the same distribution brought
to half resolution and upsampled by two with fixed kernels like learned ones, one for even and one for odd pixels. Its
noise has the same strength but is also made on the half-resolution grid: each drawn value fills a 2 x 2 block.

What differs (missing fine detail, the checkerboard of the upsampling, the correlation of the noise) lies near and above
half the Nyquist frequency: an antialiased resize to 224 x 224 or less removes it, a native crop keeps it. Scene kind,
size, file format, JPEG quality and chroma subsampling are the same for the fake and the real image with the same
number. This shows the mechanism in small; it is no evidence on the images of real generators.

In the variant "local", only one region of a fake image, an ellipse, is as above; the rest is as in a real image, noise
included. A mask in masks/fake/ shows the region. Nothing else distinguishes the classes: both versions of a scene agree
in brightness and in the strength of the noise, so that the traces end exactly at the region's edge (blending would
leave a mixture that no camera makes). Saved as JPEG, the traces reach at most the end of the 8 x 8 block that the edge
crosses (16 x 16 in colour).
"""

import colorsys
import io
import json
import math
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.layouts import MARKER, MASKS
from data.preparation.checks import Workers, in_processes
from data.records import CLASSES
from utils import UserError, replacing, write_text

Array = NDArray[np.float32]
DemoVariant = Literal["whole", "local"]  # how much of a fake image went through the decoder
SHAPES = ((640, 640), (640, 720), (720, 640), (704, 704), (640, 800), (800, 640), (640, 1000), (1000, 640))  # H, W
PNG_EVERY = 7  # images; the others are JPEG
JPEG_QUALITIES = (92, 94, 96)
SUBSAMPLINGS = ("4:4:4", "4:2:0")
PNG_BITS, JPEG_BITS = 19, 8  # per pixel: more than an image needs

# The decoder: weights of four neighbours on the coarse grid for even and for odd pixels.
EVEN_TAPS, ODD_TAPS = (-0.07, 0.27, 0.91, -0.11), (-0.10, 0.89, 0.28, -0.07)
CHECKERBOARD = 0.055  # between neighbouring pixels, as overlapping transposed convolutions leave it
LOCAL_CHECKERBOARD = 0.11  # of the variant "local": with less, 300 images are too few to learn its traces
# Horizontal, vertical and diagonal differences in the noise of a 2 x 2 block; the squares sum to 3, as of white noise.
BLOCK_NOISE = (0.65, 0.65, 1.47)
REGION_SHARES = (0.12, 0.245)  # of the image, for the variant "local"; a pixelated ellipse may be a little larger


def power_law(rng: np.random.Generator, shape: tuple[int, int], slope: float) -> Array:
    """A random field (height, width), mean 0 and deviation 1, amplitude ~ frequency ** -slope."""
    height, width = shape
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]).astype("f4")
    radius[0, 0] = np.inf
    noise = rng.standard_normal((2, *radius.shape), dtype="f4")
    field = np.fft.irfft2((noise[0] + 1j * noise[1]) * radius**-slope, s=shape)
    return (field / field.std()).astype("f4")


def colour(rng: np.random.Generator, hue: float, value: tuple[float, float]) -> Array:
    """An RGB colour (3, 1, 1) in 0..1 near the hue, its brightness drawn from the range."""
    saturation = rng.uniform(0.1, 0.6)
    rgb = colorsys.hsv_to_rgb((hue + rng.normal(0, 0.06)) % 1, saturation, rng.uniform(*value))
    return np.array(rgb, dtype="f4").reshape(3, 1, 1)


class Canvas:
    """A scene being drawn: the picture (3, height, width) in 0..1, and what it is drawn with."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int]) -> None:
        self.rng, self.shape = rng, shape
        self.y, self.x = np.mgrid[: shape[0], : shape[1]].astype("f4")
        self.fields = [power_law(rng, shape, slope) for slope in (0.9, 1.3, 1.9)]
        self.hue = rng.uniform()
        self.picture = np.zeros((3, *shape), dtype="f4")

    def field(self, number: int) -> Array:
        """One of the three textures (0 rough .. 2 smooth), shifted by a random amount."""
        shift = [int(self.rng.integers(side)) for side in self.shape]
        return np.roll(self.fields[number], shift, axis=(0, 1))

    def material(self, value: tuple[float, float] = (0.3, 0.9)) -> Array:
        """A full-frame surface (3, height, width): paint, stone, foliage, marble, wood or cloth."""
        rng, kind = self.rng, self.rng.integers(6)
        angle, step = rng.uniform(0, math.pi), math.tau / rng.uniform(14, 60)  # radians per px
        along = step * math.cos(angle) * self.x + step * math.sin(angle) * self.y
        across = step * math.cos(angle) * self.y - step * math.sin(angle) * self.x
        mixes = (
            lambda: 0.5 + 0.12 * self.field(2),
            lambda: 0.5 + 0.22 * self.field(0),
            lambda: 1 / (1 + np.exp(-4 * self.field(1))),
            lambda: np.abs(np.sin(along / 4 + 2 * self.field(2))) ** 0.5,
            lambda: 0.5 + 0.3 * np.sin(along + 1.5 * self.field(2)) + 0.1 * self.field(0),
            lambda: 0.5 + 0.2 * np.sin(along) * np.sin(2 * across) + 0.08 * self.field(0),
        )
        mix = mixes[kind]()
        light = colour(rng, self.hue + rng.choice([0, 0, 0.08, 0.5]), value)
        dark = light * rng.uniform(0.35, 0.75)
        return dark + np.clip(mix, 0, 1) * (light - dark)

    def paint(self, surface: Array, distance: Array, soft: float = 1.2) -> None:
        """Lay the surface where the signed distance (pixels) is negative; edge `soft` px wide."""
        mask = np.clip(0.5 - distance / float(soft), 0, 1)
        self.picture += mask * (surface - self.picture)

    def box(self, x: float, y: float, half_w: float, half_h: float, angle: float = 0.0) -> Array:
        """Signed distance (pixels) to a rectangle given by centre, half sides and angle."""
        c, s = math.cos(angle), math.sin(angle)
        u, v = c * (self.x - x) + s * (self.y - y), c * (self.y - y) - s * (self.x - x)
        return np.maximum(np.abs(u) - half_w, np.abs(v) - half_h)


def landscape(canvas: Canvas) -> None:
    """Sky with clouds, a sun and three to five ridges, the far ones in haze."""
    rng, (height, width) = canvas.rng, canvas.shape
    top, bottom = colour(rng, 0.6, (0.5, 0.9)), colour(rng, rng.choice([0.07, 0.55]), (0.8, 1))
    canvas.picture += top + (canvas.y / height) * (bottom - top)
    sun = np.hypot(canvas.x - rng.uniform(0, width), canvas.y - rng.uniform(0.1, 0.4) * height)
    canvas.paint(colour(rng, 0.12, (0.95, 1)), sun - rng.uniform(20, 60), rng.uniform(2, 60))
    clouds = np.clip(0.5 * canvas.field(1) - 0.1, 0, 0.8)
    canvas.picture += clouds * (np.float32(0.95) - canvas.picture)
    count = int(rng.integers(3, 6))
    for i in range(count):
        haze = 0.6 * (1 - i / (count - 1)) ** 1.5
        surface = (1 - haze) * canvas.material((0.3, 0.8)) + haze * bottom
        level, roughness = 0.4 + 0.5 * i / count, rng.uniform(0.01, 0.06)  # of the horizon, in shares of the height
        horizon = level - roughness * canvas.field(2)[int(rng.integers(height))]
        canvas.paint(surface, horizon * height - canvas.y, rng.choice([1.2, 4]))


def still_life(canvas: Canvas) -> None:
    """Balls and boxes with soft shadows on a table in front of a wall."""
    rng, (height, width) = canvas.rng, canvas.shape
    light = 1.15 - 0.5 * np.hypot(canvas.x / width - rng.uniform(), canvas.y / height - 0.2)
    canvas.picture += canvas.material() * light
    table = rng.uniform(0.45, 0.7) * height - canvas.y
    canvas.paint(canvas.material(), table, rng.choice([1.2, 8]))
    for _ in range(int(rng.integers(4, 8))):
        size = rng.uniform(0.06, 0.17) * min(height, width)
        x, y = rng.uniform(0.05, 0.95) * width, rng.uniform(0.45, 0.9) * height
        shadow = np.hypot((canvas.x - x - 0.5 * size) / 1.6, 2.5 * (canvas.y - y - 0.9 * size))
        canvas.paint(0.45 * canvas.picture, shadow - size, size)
        surface = canvas.material((0.5, 1))
        if rng.uniform() < 0.6:
            u, v = (canvas.x - x) / size, (canvas.y - y) / size
            depth = np.sqrt(np.clip(1 - u**2 - v**2, 0, 1))
            shade = np.clip(0.35 + 0.6 * depth - 0.35 * u - 0.3 * v, 0.1, 1.2)
            shine = np.clip(1 - 6 * np.hypot(u + 0.4, v + 0.4), 0, 1) * rng.uniform(0, 0.7)
            surface = surface * shade + shine
            canvas.paint(surface, np.hypot(canvas.x - x, canvas.y - y) - size)
        else:
            box = canvas.box(x, y, size * rng.uniform(0.5, 1), size, rng.normal(0, 0.1))
            canvas.paint(surface * np.clip(0.9 - (canvas.x - x) / size / 3, 0, 1.2), box)


def fields_from_above(canvas: Canvas) -> None:
    """Plots of land of different materials (Voronoi cells), hedges between them."""
    rng, (height, width) = canvas.rng, canvas.shape
    surfaces = [canvas.material((0.35, 0.9)) for _ in range(4)]
    bend = [18 * canvas.field(2) for _ in range(2)]
    nearest = second = np.full(canvas.shape, np.inf, dtype="f4")
    owner = np.zeros(canvas.shape, dtype="i4")
    for i in range(int(rng.integers(7, 15))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        distance = np.hypot(canvas.x + bend[0] - x, canvas.y + bend[1] - y)
        closer = distance < nearest
        second = np.where(closer, nearest, np.minimum(second, distance))
        nearest, owner = np.where(closer, distance, nearest), np.where(closer, i, owner)
    for i, surface in enumerate(surfaces):
        canvas.picture += (owner % len(surfaces) == i) * surface
    hedge = second - nearest - rng.uniform(3, 12)
    canvas.paint(canvas.material((0.15, 0.5)), hedge, rng.choice([1.5, 10]))


def street(canvas: Canvas) -> None:
    """House fronts with rows of windows under a sky, a pavement in front."""
    rng, (height, width) = canvas.rng, canvas.shape
    top, bottom = colour(rng, 0.58, (0.6, 0.9)), colour(rng, 0.1, (0.8, 1))
    canvas.picture += top + (canvas.y / height) * (bottom - top)
    left = -rng.uniform(0, 80)
    while left < width:
        wide, roof = rng.uniform(140, 320), rng.uniform(0.1, 0.45) * height
        house = canvas.box(left + wide / 2, roof + height / 2, wide / 2, height / 2)
        canvas.paint(canvas.material((0.5, 0.95)), house)
        step_x, step_y = rng.uniform(45, 80), rng.uniform(60, 100)
        u = np.abs((canvas.x - left) % step_x - step_x / 2) - rng.uniform(0.2, 0.35) * step_x
        v = np.abs((canvas.y - roof) % step_y - step_y / 2) - rng.uniform(0.2, 0.35) * step_y
        window = np.maximum(np.maximum(u, v), house + 8)
        canvas.paint(colour(rng, 0.1, (0.8, 1)), window - 3)
        canvas.paint(canvas.material((0.1, 0.5)), window, rng.choice([1.2, 5]))
        left += wide
    canvas.paint(canvas.material((0.3, 0.7)), rng.uniform(0.8, 0.92) * height - canvas.y)


SCENES = (landscape, still_life, fields_from_above, street)


def upsample(coarse: Array, axis: int) -> Array:
    """Double one axis of a (3, height, width) array with the decoder's kernels, edges repeated."""
    coarse = np.moveaxis(coarse, axis, 0)
    padded, size = np.concatenate([coarse[:1]] * 2 + [coarse] + [coarse[-1:]] * 2), len(coarse)
    fine = np.zeros((2 * size, *coarse.shape[1:]), dtype="f4")
    for i in range(4):
        fine[0::2] += EVEN_TAPS[i] * padded[i : i + size]
        fine[1::2] += ODD_TAPS[i] * padded[i + 1 : i + 1 + size]
    return np.moveaxis(fine, 0, axis)


def block_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Noise (3, height, width) of deviation 1 in 2 x 2 blocks, block means as in white noise."""
    half = rng.standard_normal((4, 3, shape[1] // 2, shape[2] // 2), dtype="f4") / 2
    mean, *lean = half[0], *(half[i + 1] * BLOCK_NOISE[i] for i in range(3))
    noise = np.empty(shape, dtype="f4")
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        down, right = (-1) ** y, (-1) ** x
        noise[:, y::2, x::2] = mean + right * lean[0] + down * lean[1] + down * right * lean[2]
    return noise


def draw_scene(seed: int, name: str, index: int) -> tuple[Array, np.random.Generator]:
    """The scene (3, height, width) in 0..1 of image `index` of a class, and the generator for what follows it."""
    shape = SHAPES[int(np.random.default_rng([seed, index]).integers(len(SHAPES)))]
    rng = np.random.default_rng([seed, index, CLASSES.index(name)])
    SCENES[index % len(SCENES)](canvas := Canvas(rng, shape))
    return np.clip(canvas.picture, 0, 1), rng


def expose(
    scene: Array, name: str, rng: np.random.Generator, deviation: float, checkerboard: float = CHECKERBOARD
) -> NDArray[np.uint8]:
    """Pixels (height, width, 3) of the scene, with noise, and with the decoder's traces if `name` is "fake"."""
    if name == "fake":
        _, height, width = scene.shape
        coarse = scene.reshape(3, height // 2, 2, width // 2, 2).mean((2, 4))
        sign = (-1) ** np.add.outer(np.arange(height), np.arange(width)).astype("f4")
        scene = upsample(upsample(coarse, 1), 2)
        scene = np.maximum(scene + checkerboard * sign * (0.3 + scene), 0)
        noise = block_noise(rng, scene.shape)
    else:
        noise = rng.standard_normal(scene.shape, dtype="f4")
    strength = np.float32(deviation) * (0.6 + 0.6 * np.sqrt(scene))  # shot noise grows with light
    pixels = np.rint(12 + 216 * scene + strength * noise)
    return np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def render(scene: Array, name: str, rng: np.random.Generator) -> Image.Image:
    """The scene as an image of class `name` ("fake" or "real"), with the decoder's or the sensor's traces: RGB."""
    return Image.fromarray(expose(scene, name, rng, rng.uniform(2.5, 5)))


def draw_region(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    """Where a fake image of the variant "local" has the decoder's traces (height, width): an ellipse inside it."""
    size, ratio = math.sqrt(rng.uniform(*REGION_SHARES) / math.pi), rng.uniform(0.8, 1.25)
    sides, radii = (height, width), (size * ratio * height, size / ratio * width)
    y, x = ((np.arange(side) - rng.uniform(r, side - 1 - r)) / r for side, r in zip(sides, radii, strict=True))
    return np.add.outer(y**2, x**2) < 1


def render_local(scene: Array, rng: np.random.Generator) -> tuple[Image.Image, NDArray[np.bool_]]:
    """As `render` of "real", except for a region with the decoder's traces; and that region (height, width)."""
    deviation = rng.uniform(2.5, 5)
    sensor = expose(scene, "real", rng, deviation)
    decoder = expose(scene, "fake", rng, deviation, LOCAL_CHECKERBOARD)
    region = draw_region(rng, *scene.shape[1:])
    return Image.fromarray(np.where(region[..., None], decoder, sensor)), region


def encode(image: Image.Image, seed: int, index: int) -> tuple[str, bytes]:
    """The file suffix and the bytes of an image, which depend on its index but not on its class.

    The decoder's traces take more bytes than what they replace, so that file sizes would give the class away. Zeros
    after the end of the picture, which decoders ignore, make the size a function of the index.
    """
    rng, buffer = np.random.default_rng([seed, index, len(CLASSES)]), io.BytesIO()
    if index % PNG_EVERY == 0:
        suffix, bits = ".png", PNG_BITS
        image.save(buffer, "PNG", compress_level=4)
    else:
        suffix, bits = ".jpg", JPEG_BITS
        quality, subsampling = int(rng.choice(JPEG_QUALITIES)), str(rng.choice(SUBSAMPLINGS))
        image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    size = int(image.width * image.height * bits * rng.uniform(1, 1.1) / 8)
    return suffix, buffer.getvalue().ljust(size, b"\0")


def write_image(class_name: str, index: int, root: Path, seed: int, variant: DemoVariant) -> None:
    """Write image `index` of a class as root/<class>/<index>.jpg or .png, and before it its mask, if it has one."""
    scene, rng = draw_scene(seed, class_name, index)
    if variant == "local" and class_name == "fake":
        image, region = render_local(scene, rng)
        with replacing(root / MASKS / class_name / f"{index:04d}.png") as temporary:
            Image.fromarray(np.uint8(255) * region).save(temporary, "PNG")
    else:
        image = render(scene, class_name, rng)
    suffix, content = encode(image, seed, index)
    with replacing(root / class_name / f"{index:04d}{suffix}") as temporary:
        temporary.write_bytes(content)


def write_demo_dataset(
    root: Path, images_per_class: int, variant: DemoVariant = "whole", seed: int = 606, num_workers: Workers = "auto"
) -> None:
    """Write `images_per_class` images to root/fake and to root/real, except those that are there already.

    For the variant "local", also root/masks/fake: 8-bit grey, 255 where the decoder's traces are. The pixels depend on
    the seed and the versions of numpy and Pillow, not on the number of worker processes.

    Raises:
        UserError: the root holds something else, or a demo data set of another variant, seed or size.
    """
    about: dict[str, int | str] = {"demo_dataset": 2, "seed": seed, "images_per_class": images_per_class}
    if variant != "whole":
        about["variant"] = variant
    settings, marker = json.dumps(about), root / MARKER
    if root.exists() and any(root.iterdir()) and not (marker.is_file() and marker.read_text() == settings):
        raise UserError(f"{root} is not empty and holds no demo data set of {settings}: choose another folder")
    write_text(marker, settings)
    present = {name: {path.stem for path in (root / name).glob("[0-9]*")} for name in CLASSES}
    if variant == "local":
        present["fake"] &= {path.stem for path in (root / MASKS / "fake").glob("[0-9]*")}
    every = [(name, index) for index in range(1, images_per_class + 1) for name in CLASSES]
    missing = [(name, index) for name, index in every if f"{index:04d}" not in present[name]]
    if missing:
        print(f"Drawing {len(missing):,} demo images into {root}", flush=True)
    in_processes(partial(write_image, root=root, seed=seed, variant=variant), missing, num_workers, "demo data")
