"""Colours of plots: scales that fall evenly, and heads that differ."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from plot_cases import (
    lightness,
)

from fastattn.plot import colours

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, which draws the plots, is not installed")
matplotlib.use("agg")
from matplotlib.colors import to_rgb  # noqa: E402


class TestColours:
    def test_lightness_falls_evenly(self) -> None:
        found = [lightness(colours.shade(fraction)) for fraction in np.linspace(0, 1, 65)]
        np.testing.assert_allclose(found, np.linspace(100, 16, 65), atol=1.5)
        assert (np.diff(found) < 0).all()

    def test_nan_is_no_colour_of_the_scale(self) -> None:
        nan = np.array(to_rgb(colours.shade(float("nan"))))
        scale = np.array([to_rgb(colours.shade(fraction)) for fraction in np.linspace(0, 1, 65)])
        assert np.abs(scale - nan).max(axis=1).min() > 0.3

    def test_what_is_written_on_a_shade_is_legible(self) -> None:
        for fraction in np.linspace(0, 1, 101):
            field = colours.shade(fraction)
            light, dark = sorted((lightness(field), lightness(colours.ink_on(field))), reverse=True)
            luminance = [((each + 16) / 116) ** 3 for each in (light, dark)]
            luminance[1] = 0.0 if dark == 0 else luminance[1]
            assert (luminance[0] + 0.05) / (luminance[1] + 0.05) >= 3.7

    def test_heads_differ(self) -> None:
        for one, other in itertools.combinations(colours.HEAD_COLOURS, 2):
            assert np.abs(np.subtract(to_rgb(one), to_rgb(other))).max() > 0.2
