"""docs/masks.md and its pictures say what the package computes."""

import re
import xml.etree.ElementTree

import pytest
import torch

import draw_masks
from paths import ROOT

PAGE = (ROOT / "docs" / "masks.md").read_text()


@pytest.mark.parametrize("name", draw_masks.PICTURES)
def test_pictures_are_up_to_date(name):
    path = draw_masks.FOLDER / f"{name}.svg"
    assert path.read_text() == draw_masks.as_svg(draw_masks.PICTURES[name]()), "run python examples/draw_masks.py"
    assert f"(masks/{name}.svg)" in PAGE
    xml.etree.ElementTree.parse(path)
    assert path.stat().st_size < 6000


def test_the_page_shows_no_others():
    shown = re.findall(r"\(masks/(\w+)\.svg\)", PAGE)
    assert sorted(shown) == sorted(draw_masks.PICTURES) == sorted(path.stem for path in draw_masks.FOLDER.glob("*.svg"))


def test_a_picture_has_the_shade_of_every_share():
    picture = draw_masks.as_svg(torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, torch.nan]]))
    paths = dict(re.findall(r'<path fill="(#\w+)" d="([^"]+)"', picture))
    squares = {color: d.count("z") for color, d in paths.items()}
    assert squares == {"#ffffff": 3, "#8fb0d7": 1, "#1f62af": 1}
