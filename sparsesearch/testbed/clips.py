"""Procedural clips: textured sprites that move before a panning or zooming background, with a caption of thirteen symbols.

Everything is drawn on the device in one batch. The order of the draws is part of the data: the same seed gives the same clips on the same
kind of device, and the weights of `wan-tiny-11m` and its published figures belong to exactly these.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FRAMES, SIDE = 16, 32
CAPTION_SYMBOLS = 13
_CANVAS = 64  # side of the periodic background
_SPRITE_SYMBOLS = 22  # shape 10 + colour 8 + motion 4
_PAN, _BAR, _COUNT, _SPRITES = 4, 10, 13, 16  # first caption symbol of each kind; backgrounds start at 0
ABSENT = _SPRITES + 3 * _SPRITE_SYMBOLS
"""Symbol of a sprite that is not there, and of a dropped caption."""
VOCABULARY = ABSENT + 1

_SEGMENTS = {  # of a digit: centre x, y and half sizes
    "a": (0, -0.9, 0.42, 0.17), "g": (0, 0, 0.42, 0.17), "d": (0, 0.9, 0.42, 0.17), "f": (-0.52, -0.45, 0.17, 0.5),
    "b": (0.52, -0.45, 0.17, 0.5), "e": (-0.52, 0.45, 0.17, 0.5), "c": (0.52, 0.45, 0.17, 0.5),
}  # fmt: skip
_DIGITS = ("abged", "abgcd", "fgbc", "afgcd", "abc")  # 2 3 4 5 7
_PALETTE = (
    (1, -0.6, -0.6), (-0.6, 0.9, -0.5), (-0.5, -0.3, 1), (1, 0.9, -0.7), (-0.7, 0.9, 0.9), (1, -0.5, 0.9), (1, 0.4, -0.8),
    (0.95, 0.95, 0.95),
)  # fmt: skip


@dataclass(frozen=True)
class Clips:
    """A batch of clips.

    Attributes:
        video: pixels in [-1, 1].
        captions: symbols below VOCABULARY.
    """

    video: Float[Tensor, "B 3 F Y X"]
    captions: Int[Tensor, "B 13"]


@dataclass(frozen=True)
class _Draw:
    """Random numbers of one batch."""

    batch: int
    device: torch.device | str
    generator: torch.Generator | None

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(self.batch, *shape, device=self.device, generator=self.generator) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, device=self.device, generator=self.generator)

    def integer(self, end: int) -> Tensor:
        return torch.randint(0, end, (self.batch,), device=self.device, generator=self.generator)

    def sometimes(self, probability: float) -> Tensor:
        return torch.rand(self.batch, device=self.device, generator=self.generator) < probability


@dataclass(frozen=True)
class _Canvas:
    """Pixel centres and frame numbers, shaped to broadcast against [B, F, Y, X]."""

    x: Float[Tensor, "Y X"]
    y: Float[Tensor, "Y X"]
    frame: Float[Tensor, "1 F"]
    side: int

    @classmethod
    def of(cls, frames: int, side: int, device: torch.device | str) -> "_Canvas":
        axis = torch.arange(side, device=device).float() + 0.5
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        return cls(x, y, torch.arange(frames, device=device).float().view(1, frames), side)


@torch.no_grad()
def render_clips(
    count: int,
    *,
    frames: int = FRAMES,
    side: int = SIDE,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Clips:
    """Draw `count` clips of `frames` frames of side x side pixels.

    Args:
        count: clips.
        frames: frames of each.
        side: pixels per side.
        device: where to draw; the generator must be of this device.
        generator: of all randomness.
    """
    draw, canvas = _Draw(count, device, generator), _Canvas.of(frames, side, device)
    captions = torch.full((count, CAPTION_SYMBOLS), ABSENT, dtype=torch.long, device=device)
    video = _background(draw, canvas, captions)
    sprites = draw.integer(3)
    captions[:, 3] = _COUNT + sprites
    for index in range(3):
        video = _sprite(draw, canvas, captions, video, index, sprites >= index)
    return Clips(_light(draw, canvas, _bar(draw, canvas, captions, video)), captions)


def _background(draw: _Draw, canvas: _Canvas, captions: Tensor) -> Tensor:
    """Coloured noise of three slopes, or a grating, under a camera that stands, pans or zooms."""
    kind = draw.integer(4)
    texture = _texture(draw, kind)
    camera = torch.where(draw.sometimes(0.45), torch.zeros_like(kind), 1 + draw.integer(5))
    speed = draw.uniform(0.15, 0.9)
    still = torch.zeros_like(speed)
    speed_x = torch.where(camera == 1, -speed, torch.where(camera == 2, speed, still))
    speed_y = torch.where(camera == 3, -speed, torch.where(camera == 4, speed, still))
    zoom = (camera == 5).float() * draw.uniform(-0.03, 0.03)
    captions[:, 0], captions[:, 1] = kind, _PAN + camera
    scale = (1 + zoom[:, None] * canvas.frame)[..., None, None]
    x, y = (
        (axis - canvas.side / 2) * scale
        + (draw.uniform(0, _CANVAS)[:, None] + velocity[:, None] * canvas.frame)[..., None, None]
        for axis, velocity in ((canvas.x, speed_x), (canvas.y, speed_y))
    )
    return _bilinear(texture, x, y)


def _texture(draw: _Draw, kind: Tensor) -> Float[Tensor, "B 3 N N"]:
    device, batch = draw.device, draw.batch
    rows = torch.fft.fftfreq(_CANVAS, device=device).view(-1, 1) * _CANVAS
    columns = torch.fft.rfftfreq(_CANVAS, device=device).view(1, -1) * _CANVAS
    frequency = (rows**2 + columns**2).sqrt().clamp_min(1)
    slope = torch.tensor([2.6, 1.9, 1.2, 1.9], device=device)[kind].view(batch, 1, 1, 1)
    spectrum = torch.fft.rfft2(draw.normal(2, _CANVAS, _CANVAS)) * (frequency**-slope) * (frequency > 1.5)
    noise = torch.fft.irfft2(spectrum, s=(_CANVAS, _CANVAS))
    noise = noise / noise.std((2, 3), keepdim=True)
    wave_x, wave_y = draw.integer(17) - 8, draw.integer(9)
    wave_y = torch.where((wave_x.abs() < 2) & (wave_y < 2), wave_y + 4, wave_y)
    phase = torch.arange(_CANVAS, device=device) * (2 * math.pi / _CANVAS)
    grating = torch.tanh(3 * torch.sin(wave_x.view(-1, 1, 1) * phase + wave_y.view(-1, 1, 1) * phase[:, None]))
    noise = torch.where((kind == 3).view(-1, 1, 1, 1), torch.stack([grating, noise[:, 1] * 0.5], 1), noise)
    base, first, second = draw.uniform(-0.5, 0.5, 3, 1, 1), draw.normal(3, 1, 1) * 0.3, draw.normal(3, 1, 1) * 0.15
    texture: Tensor = (base + first * noise[:, :1] + second * noise[:, 1:]).clamp(-1, 1)
    return texture


def _bilinear(texture: Tensor, x: Tensor, y: Tensor) -> Float[Tensor, "B 3 F Y X"]:
    """Read a periodic texture at real positions [B, F, Y, X]."""
    flat = texture.flatten(2)
    left, top = x.floor(), y.floor()
    right_share, bottom_share = (x - left).unsqueeze(1), (y - top).unsqueeze(1)

    def tap(dx: int, dy: int) -> Tensor:
        index = ((top + dy) % _CANVAS).long() * _CANVAS + ((left + dx) % _CANVAS).long()
        pixels: Tensor = flat.gather(2, index.flatten(1)[:, None].expand(-1, 3, -1)).unflatten(2, x.shape[1:])
        return pixels

    upper = tap(0, 0) * (1 - right_share) + tap(1, 0) * right_share
    lower = tap(0, 1) * (1 - right_share) + tap(1, 1) * right_share
    return upper * (1 - bottom_share) + lower * bottom_share


def _sprite(
    draw: _Draw, canvas: _Canvas, captions: Tensor, video: Tensor, index: int, there: Bool[Tensor, " B"]
) -> Tensor:
    """Lay one sprite over the video."""
    shape, colour, motion = draw.integer(10), draw.integer(8), draw.integer(4)
    first = _SPRITES + index * _SPRITE_SYMBOLS
    for place, symbol in enumerate((shape, colour + 10, motion + 18)):
        captions[:, 4 + 3 * index + place] = torch.where(there, first + symbol, ABSENT)
    radius = draw.uniform(3.5, 7.5)
    x, y = _path(draw, canvas, motion)
    turn = draw.uniform(-0.25, 0.25) * draw.sometimes(0.5)
    angle = (turn[:, None] * canvas.frame + draw.uniform(-0.5, 0.5)[:, None])[..., None, None]
    size = radius.view(-1, 1, 1, 1)
    dx, dy = (canvas.x - x[..., None, None]) / size, (canvas.y - y[..., None, None]) / size
    u, v = dx * angle.cos() + dy * angle.sin(), -dx * angle.sin() + dy * angle.cos()
    alpha = ((0.5 - _distance(shape, u, v) * size).clamp(0, 1) * there.view(-1, 1, 1, 1)).unsqueeze(1)
    kind, fineness = draw.integer(3).view(-1, 1, 1, 1), draw.uniform(4, 8).view(-1, 1, 1, 1)
    stripes, checks = (
        torch.tanh(4 * torch.sin(fineness * u)),
        torch.tanh(5 * torch.sin(fineness * u) * torch.sin(fineness * v)),
    )
    pattern = torch.where(kind == 1, stripes, torch.where(kind == 2, checks, torch.ones_like(u)))
    own = torch.tensor(_PALETTE, device=draw.device)[colour].view(-1, 3, 1, 1, 1)
    other = (own * -0.5 + draw.uniform(-0.3, 0.3, 3, 1, 1, 1)).clamp(-1, 1)
    share = (0.5 + 0.5 * pattern).unsqueeze(1)
    return video * (1 - alpha) + (own * share + other * (1 - share)) * alpha


def _path(draw: _Draw, canvas: _Canvas, motion: Tensor) -> tuple[Tensor, Tensor]:
    """Centre [B, F] of a sprite that drifts, circles, wobbles or bounces."""
    side, frame = canvas.side, canvas.frame
    start_x, start_y = draw.uniform(4, side - 4)[:, None], draw.uniform(4, side - 4)[:, None]
    heading, speed = draw.uniform(0, 2 * math.pi)[:, None], draw.uniform(0.3, 1.8)[:, None]
    phase = draw.uniform(0, 6.28)[:, None]

    def reflected(position: Tensor) -> Tensor:
        low, width = 3, side - 6
        return low + width - ((position - low) % (2 * width) - width).abs()

    drift_x, drift_y = (
        reflected(p + speed * d * frame) for p, d in ((start_x, heading.cos()), (start_y, heading.sin()))
    )
    around = speed / 7 * frame + phase
    circle_x = side / 2 + (start_x - side / 2) * 0.3 + 8 * torch.cos(around)
    circle_y = side / 2 + (start_y - side / 2) * 0.3 + 8 * torch.sin(around)
    wobble_x, wobble_y = start_x + torch.sin(0.5 * frame + phase), start_y + 0 * frame
    bounce_y = side - 5 - 20 * torch.sin((0.12 + 0.1 * speed) * frame + phase).abs()

    def chosen(drift: Tensor, circle: Tensor, wobble: Tensor, bounce: Tensor) -> Tensor:
        rest = torch.where(motion[:, None] == 2, wobble, bounce)
        return torch.where(motion[:, None] == 0, drift, torch.where(motion[:, None] == 1, circle, rest))

    return chosen(drift_x, circle_x, wobble_x, drift_x), chosen(drift_y, circle_y, wobble_y, bounce_y)


def _distance(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance, in radii, to a disc, square, triangle, ring, cross or one of five digits."""
    kind = shape.view(-1, 1, 1, 1)

    def box(x: float, y: float, half_x: float, half_y: float) -> Tensor:
        return torch.maximum((u - x).abs() - half_x, (v - y).abs() - half_y)

    from_centre = (u**2 + v**2).sqrt()
    found = from_centre - 1
    found = torch.where(kind == 1, box(0, 0, 0.85, 0.85), found)
    found = torch.where(kind == 2, torch.maximum(u.abs() * 0.866 + v * 0.5, -v) - 0.5, found)
    found = torch.where(kind == 3, (from_centre - 0.72).abs() - 0.27, found)
    found = torch.where(kind == 4, torch.minimum(box(0, 0, 1, 0.32), box(0, 0, 0.32, 1)), found)
    lit = torch.tensor([[name in digit for name in _SEGMENTS] for digit in _DIGITS], device=u.device)
    on = lit[(shape - 5).clamp_min(0)]
    far = torch.full_like(found, 9.0)
    digit = far
    for place, segment in enumerate(_SEGMENTS.values()):
        digit = torch.minimum(digit, torch.where(on[:, place].view(-1, 1, 1, 1), box(*segment), far))
    return torch.where(kind >= 5, digit, found)


def _bar(draw: _Draw, canvas: _Canvas, captions: Tensor, video: Tensor) -> Tensor:
    """A standing bar in the foreground, upright or lying, in a third of the clips."""
    nothing = draw.sometimes(0.65)
    kind = torch.where(nothing, 0, 1 + draw.integer(2))
    captions[:, 2] = _BAR + kind
    centre, half = draw.uniform(6, canvas.side - 6).view(-1, 1, 1), draw.uniform(1.5, 3).view(-1, 1, 1)
    away = torch.where((kind == 1).view(-1, 1, 1), canvas.x - centre, canvas.y - centre).abs() - half
    alpha = ((0.5 - away).clamp(0, 1) * (kind > 0).view(-1, 1, 1))[:, None, None]
    return video * (1 - alpha) + draw.uniform(-0.8, 0.8, 3, 1, 1, 1) * alpha


def _light(draw: _Draw, canvas: _Canvas, video: Tensor) -> Tensor:
    """Light that swells and fades, in a third of the clips."""
    amplitude = draw.sometimes(0.35) * draw.uniform(0.1, 0.3)
    frequency, phase = draw.uniform(0.2, 1.2)[:, None], draw.uniform(0, 6.28)[:, None]
    light = 1 + amplitude[:, None] * torch.sin(frequency * canvas.frame + phase)
    return ((video + 1) * light[:, None, :, None, None] - 1).clamp(-1, 1)
