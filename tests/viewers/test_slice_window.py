import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.backend_bases import KeyEvent, MouseEvent
from matplotlib.colors import to_rgba

from viewers import slice_window
from viewers.slice_window import Picture, SliceWindow


def picture(number):
    """Grey of the number; the outlined square begins at it."""
    mask = np.zeros((30, 40), bool)
    mask[number : number + 5, 10:20] = True
    return Picture(np.full((30, 40), number / 24), {"lung": mask}, f"slice {number}")


def other(number):
    return Picture(np.ones((30, 40)), {"lung": np.zeros((30, 40))}, f"other {number}")


@pytest.fixture(autouse=True)
def no_display():
    pyplot.switch_backend("Agg")


@pytest.fixture
def window():
    yield SliceWindow(24, [picture, other], start=3)
    pyplot.close("all")


def press(window, *keys):
    canvas = window.figure.canvas
    for key in keys:
        canvas.callbacks.process("key_press_event", KeyEvent("key", canvas, key))


def test_the_first_picture_is_shown_with_its_outline_and_legend(window):
    assert window.axes.get_title() == "slice 3"
    assert (window.image.get_array() == 3 / 24).all()
    assert window.slider.val == 4
    (name,) = window.axes.get_legend().get_texts()
    assert name.get_text() == "lung"
    (border,) = window.borders
    assert to_rgba(border.get_edgecolor()[0]) == to_rgba(slice_window.COLOURS[0])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["right"], 4),
        (["right", "up", "left"], 4),
        (["left"] * 5, 0),
        (["pageup"], 13),
        (["pagedown"], 0),
        (["end"], 23),
        (["end", "right"], 23),
        (["end", "home"], 0),
    ],
)
def test_keys_lead_to_other_pictures_and_stop_at_the_ends(window, keys, expected):
    press(window, *keys)
    assert window.number == expected
    assert window.axes.get_title() == f"slice {expected}"
    assert window.slider.val == expected + 1
    assert (window.image.get_array() == expected / 24).all()


def test_the_outline_is_that_of_the_picture_shown(window):
    press(window, "right", "right")
    (border,) = window.borders
    vertices = border.get_paths()[0].vertices
    # Rows 5 to 9 and columns 10 to 19: half a pixel beyond their centres.
    assert np.array_equal(vertices.min(axis=0), [9.5, 4.5])
    assert np.array_equal(vertices.max(axis=0), [19.5, 9.5])


def test_slider_and_wheel_lead_there_too(window):
    window.slider.set_val(18)
    assert window.axes.get_title() == "slice 17"
    canvas = window.figure.canvas
    canvas.callbacks.process(
        "scroll_event", MouseEvent("scroll", canvas, 0, 0, step=-2)
    )
    assert window.axes.get_title() == "slice 15"
    assert window.slider.val == 16


def test_a_key_shows_the_same_number_otherwise_and_back(window):
    press(window, "a")
    assert window.axes.get_title() == "other 3"
    assert window.borders == []
    press(window, "right", "a")
    assert window.axes.get_title() == "slice 4"


def test_a_mask_of_everything_and_one_picture_alone_are_no_trouble():
    full = Picture(np.zeros((8, 8)), {"lung": np.ones((8, 8))}, "full")
    window = SliceWindow(1, [lambda number: full])
    press(window, "right", "end")
    assert window.number == 0
    window.slider.set_val(2)
    assert window.number == 0
    pyplot.close("all")


def test_without_a_display_the_error_says_what_is_expected():
    with pytest.raises(
        ValueError, match=r"backend Agg; expected a display, and tkinter"
    ):
        slice_window.browse(24, [picture])
    assert pyplot.get_fignums() == []
