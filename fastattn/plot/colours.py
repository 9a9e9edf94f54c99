"""The colours of all pictures, chosen to be told apart by colour-blind people and in grey print."""

from __future__ import annotations

import math

__all__ = ["HEAD_COLOURS", "NAN_COLOUR", "RAMP", "ink_on", "shade"]

#: From weight 0 to the largest: white to dark blue, in even steps of CIELAB's lightness, 100 to 16.
RAMP = ("#ffffff", "#bbe7ff", "#7ccdfa", "#34b2ef", "#0a94d4", "#1276b2", "#0c5b91", "#014071", "#03284f")
#: What is not a number; nothing else in a map is of this colour.
NAN_COLOUR = "#d55e00"
#: The palette of Okabe and Ito, without the yellow that white paper swallows.
HEAD_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#000000")


def shade(fraction: float) -> str:
    """Return the colour of a weight that is this fraction of the scale, as "#rrggbb".

    Examples
    --------
    >>> from fastattn.plot.colours import shade
    >>> shade(0.0), shade(0.5), shade(1.0), shade(float("nan"))
    ('#ffffff', '#0a94d4', '#03284f', '#d55e00')
    """
    if math.isnan(fraction):
        return NAN_COLOUR
    place = min(max(fraction, 0.0), 1.0) * (len(RAMP) - 1)
    step = min(int(place), len(RAMP) - 2)
    low, high = _channels(RAMP[step]), _channels(RAMP[step + 1])
    return "#" + "".join(f"{round(a + (b - a) * (place - step)):02x}" for a, b in zip(low, high, strict=True))


def ink_on(colour: str) -> str:
    """Return black or white, whichever is easier to read on a background: white already where its contrast is 3.75."""
    red, green, blue = (_linear(channel / 255) for channel in _channels(colour))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#ffffff" if 1.05 / (luminance + 0.05) >= 3.75 else "#000000"


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)
