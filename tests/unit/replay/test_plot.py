"""Pictures: real files of the kind named, that show something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from headrace.errors import StartupError
from services.replay.plot import check_suffix, plot
from services.replay.report import Report, summarize
from tests.unit.replay.results import result


def _reports(speeds: list[float], policies: tuple[str, ...] = ("kv", "session")) -> list[Report]:
    return [
        summarize(
            result([10.0 * n * speed, 500.0 * n * speed], policy=policy, speed=speed, cached=n)
        )
        for speed in speeds
        for n, policy in enumerate(policies, 1)
    ]


@pytest.mark.parametrize("speeds", [[1.0], [1.0, 2.0, 8.0]], ids=["bars", "curves"])
def test_png(speeds: list[float], tmp_path: Path) -> None:
    path = tmp_path / "load.png"
    plot(_reports(speeds), path, title="two policies")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    assert pixels.shape[0] > 500
    # Both policies' colours are there (0072B2 and D55E00).
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        near = np.abs(pixels[..., :3] * 255 - np.array(colour)).max(axis=-1) < 8
        assert near.sum() > 100


def test_what_was_not_measured_can_be_drawn(tmp_path: Path) -> None:
    nothing = result([float("nan")], gap_counts=np.array([0, 0]))
    plot([summarize(nothing)], tmp_path / "nothing.png", title="nothing")
    one_moment = [
        summarize(result([5.0, 6.0], speed=speed, arrival_step_ms=0.0)) for speed in (1.0, 2.0)
    ]
    plot(one_moment, tmp_path / "burst.svg", title="a burst")
    assert "<svg" in (tmp_path / "burst.svg").read_text()


def test_kinds_of_pictures() -> None:
    check_suffix(Path("a.PNG"))
    with pytest.raises(StartupError, match=r"--plot writes .png, .svg, .pdf, not 'a.gif'"):
        check_suffix(Path("a.gif"))


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"absent/a.png can't be written: No such file"):
        plot(_reports([1.0]), tmp_path / "absent" / "a.png", title="")
