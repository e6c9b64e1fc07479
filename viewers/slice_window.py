"""A window that steps through outlined slices by keys, wheel or slider."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

STEPS = {"right": 1, "left": -1, "up": 1, "down": -1, "pageup": 10, "pagedown": -10}
"""Slices that each key moves by; home and end go to the first and the last slice."""
NEXT_VIEW = "a"
"""Key that shows the same slice in the next view, if there are several."""
FREED_KEYS: dict[Any, Any] = {
    "keymap.home": [],
    "keymap.back": [],
    "keymap.forward": [],
}
"""Settings that free the keys which matplotlib's toolbar uses."""

COLOURS = ("lime", "deepskyblue", "orange", "magenta")
"""Colours of the outlines, in their order."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture that the window shows.

    Attributes:
        image: (y, x) grey values from 0 (black) to 1 (white).
        outlined: Masks (y, x) by name, whose borders are drawn; all pictures have the same
            names.
        title: Text above the image.
    """

    image: np.ndarray
    outlined: Mapping[str, np.ndarray]
    title: str


class SliceWindow:
    """A matplotlib figure with one picture, a slider and key bindings to reach the others.

    Args:
        count: Number of pictures.
        views: Functions that make the picture of an index from 0; the key `NEXT_VIEW`
            cycles through them.
        start: Index of the first picture shown.

    Attributes:
        number, view: Index of the picture shown, and of its view.
    """

    def __init__(
        self, count: int, views: Sequence[Callable[[int], Picture]], *, start: int = 0
    ) -> None:
        from matplotlib import pyplot, widgets

        self.count = count
        self.views = views
        self.number, self.view = start, 0
        picture = views[0](start)
        self.figure, self.axes = pyplot.subplots(figsize=(8, 8))
        self.axes.set_axis_off()
        self.image = self.axes.imshow(picture.image, cmap="gray", vmin=0, vmax=1)
        self.borders: list[Any] = []
        if picture.outlined:
            self._add_legend(picture)
        place = self.figure.add_axes((0.2, 0.02, 0.6, 0.03))
        last = max(count - 1, 1)
        self.slider = widgets.Slider(
            place, f"1 to {count}", 1, last + 1, valinit=start + 1, valstep=1
        )
        self.slider.on_changed(lambda value: self.go_to(int(value) - 1))
        connect = self.figure.canvas.mpl_connect
        connect("key_press_event", self.on_key)
        connect("scroll_event", self.on_scroll)
        self._draw(picture)

    def on_key(self, event: Any) -> None:
        """Moves by the pressed key; matplotlib handles other keys."""
        ends = {"home": 0, "end": self.count - 1}
        if event.key in STEPS:
            self.go_to(self.number + STEPS[event.key])
        elif event.key in ends:
            self.go_to(ends[event.key])
        elif event.key == NEXT_VIEW:
            self.view = (self.view + 1) % len(self.views)
            self._draw(self.views[self.view](self.number))

    def on_scroll(self, event: Any) -> None:
        """Moves by the steps of the wheel."""
        self.go_to(self.number + int(event.step))

    def go_to(self, number: int) -> None:
        """Shows a picture; an index beyond the ends shows the first or the last."""
        number = min(max(number, 0), self.count - 1)
        if number != self.number:
            self.number = number
            self._draw(self.views[self.view](number))
        if self.slider.val != number + 1:
            self.slider.set_val(number + 1)

    def _draw(self, picture: Picture) -> None:
        self.image.set_data(picture.image)
        for border in self.borders:
            border.remove()
        self.borders = [
            self.axes.contour(mask, levels=[0.5], colors=colour, linewidths=1)
            for mask, colour in zip(picture.outlined.values(), COLOURS, strict=False)
            if np.any(mask) and not np.all(mask)
        ]
        self.axes.set_title(picture.title, fontsize=9)
        self.figure.canvas.draw_idle()

    def _add_legend(self, picture: Picture) -> None:
        from matplotlib.lines import Line2D

        lines = [
            Line2D([], [], color=colour, label=name)
            for name, colour in zip(picture.outlined, COLOURS, strict=False)
        ]
        self.axes.legend(handles=lines, loc="lower right", fontsize=8)


def browse(
    count: int, views: Sequence[Callable[[int], Picture]], *, start: int = 0
) -> None:
    """Opens a `SliceWindow` and returns once it is closed.

    Raises:
        ValueError: If no window can be opened on this machine.
    """
    from matplotlib import pyplot
    from matplotlib.backends.registry import BackendFilter, backend_registry

    backend = pyplot.get_backend()
    if backend.lower() in backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE):
        raise ValueError(
            f"cannot open a window: matplotlib uses the backend {backend}; expected "
            "a display, and tkinter or Qt (pip install -r requirements/viewers.txt)"
        )
    with pyplot.rc_context(FREED_KEYS):
        window = SliceWindow(count, views, start=start)
        pyplot.show()
        pyplot.close(window.figure)
