"""Pictures of items: equal pixels are equal, files are read or refused in one line, ids know them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headwise.errors import InputError
from headwise.probes.item import Item, Passage, Twin
from headwise.probes.picture import Picture, Region


def picture(seed: int = 0, height: int = 6, width: int = 9) -> Picture:
    return Picture.drawn(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_a_drawn_picture_keeps_its_pixels() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    drawn = Picture.drawn(pixels)
    assert drawn.size == (3, 2)
    assert np.array_equal(drawn.array(), pixels)
    assert np.array_equal(np.asarray(drawn.image()), pixels)
    assert drawn == Picture.drawn(pixels.copy())
    # The same bytes in another shape are another picture.
    assert drawn != Picture.drawn(pixels.reshape(3, 2, 3))


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(InputError, match=r"uint8 \[row, column, 3\], not from float64 \[2, 3, 3\]"):
        Picture.drawn(np.zeros((2, 3, 3)))  # type: ignore[arg-type]


def test_a_picture_in_a_file(tmp_path: Path) -> None:
    drawn = picture()
    drawn.image().save(tmp_path / "a.png")
    read = Picture.of_file(tmp_path / "a.png")
    assert read.size == drawn.size
    assert np.array_equal(read.array(), drawn.array())


def test_a_photograph_is_turned_as_it_says(tmp_path: Path) -> None:
    image = Image.fromarray(picture(height=4, width=8).array())
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "a.jpg", exif=exif)
    assert Picture.of_file(tmp_path / "a.jpg").size == (4, 8)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; check the name"):
        Picture.of_file(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"text\.png cannot be read"):
        Picture.of_file(tmp_path / "text.png")
    with pytest.raises(InputError, match="cannot be read"):
        Picture.of_file(tmp_path)


@pytest.mark.parametrize("box", [(3, 0, 3, 2), (0, 4, 2, 3), (-1, 0, 2, 2)])
def test_a_region_has_pixels(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(InputError, match="left below right"):
        Region(0, box)


def test_as_many_pictures_as_marks() -> None:
    with pytest.raises(InputError, match="the prompt has 1 marks <image> and the item 2 pictures"):
        Item(prompt="<image> what?", answer=" a", pictures=(picture(), picture(1)))
    with pytest.raises(InputError, match="region 'x' is of picture 1, and there are 1"):
        Item(prompt="<image>", answer=" a", pictures=(picture(),), regions={"x": Region(1, (0, 0, 1, 1))})
    with pytest.raises(InputError, match="reaches out of its picture of 9 x 6 pixels"):
        Item(prompt="<image>", answer=" a", pictures=(picture(),), regions={"x": Region(0, (0, 0, 10, 1))})
    twin = Twin(prompt="no mark")
    with pytest.raises(InputError, match="the prompt has 0 marks"):
        Item(prompt="<image>", answer=" a", pictures=(picture(),), twin=twin)


def test_a_text_may_speak_of_pictures() -> None:
    assert Item(prompt="write <image> here", answer=" a").pictures == ()


def test_the_id_of_an_item_knows_its_pictures() -> None:
    def item(seed: int) -> Item:
        return Passage().add("<image> what?").item(" a", pictures=(picture(seed),)).named("p")

    assert item(0).id == item(0).id
    assert item(0).id != item(1).id
    plain = Passage().add("what?").item(" a").named("p")
    assert plain.id == "p-" + plain.id.split("-")[1]


def test_deep_gray_is_refused_and_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="more than 8 bits a channel"):
        Picture.of_file(tmp_path / "deep.png")
