"""Labels beside the points of a picture, where there is room for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from runner.report.picture import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

XY = tuple[float, float]

_GAP_POINTS = 7.0
_LEVEL_POINTS = 11.0
_LEVELS = 4
_BETWEEN_POINTS = 2.0
_LEADER_SAMPLES = 12


def place_labels(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[float, float, str]],
    *,
    clear_points: float,
    clear_line: Sequence[XY] = (),
) -> None:
    """Write each label near its point, where it hides neither a point nor an earlier label.

    Points whose markers overlap share the first one's label, with ``+n`` for the others; a label
    that finds no room is left out.

    Args:
        figure: the whole picture, which decides where the axes lie.
        axes: drawn except for the labels.
        labels: x and y in data coordinates and the text, the most important first.
        clear_points: diameter of a point's marker, in points.
        clear_line: corners, in data coordinates, of a line of upright and level pieces that labels
            keep off as well.
    """
    figure.draw_without_rendering()
    markers = [_marker_box(axes, (x, y), clear_points * figure.dpi / 72) for x, y, _ in labels]
    room = _Room(axes, [*markers, *_line_boxes(axes, clear_line)], figure.dpi / 72)
    for index, others in clusters(markers):
        x, y, text = labels[index]
        text = f"{text} +{others}".lstrip() if others else text
        if text:
            room.place((x, y), text)


def clusters(markers: Sequence[Bbox]) -> list[tuple[int, int]]:
    """(index of a marker, how many later ones overlap it) for each that no earlier one claims."""
    free = list(range(len(markers)))
    found = []
    while free:
        first, *rest = free
        free = [index for index in rest if not markers[first].overlaps(markers[index])]
        found.append((first, len(rest) - len(free)))
    return found


class _Room:
    """What is taken of the axes, in pixels: boxes, and the lines from labels to their points."""

    def __init__(self, axes: Axes, taken: Sequence[Bbox], pixels_per_point: float) -> None:
        self._axes, self._taken = axes, list(taken)
        self._texts: list[Bbox] = []
        self._leaders: list[XY] = []
        self._padding = _BETWEEN_POINTS * pixels_per_point
        self._inside = axes.get_window_extent().padded(-self._padding)

    def place(self, at: XY, text: str) -> None:
        """Write a label at the nearest free place, or not at all."""
        for offset in _offsets():
            label = _write(self._axes, at, text, offset)
            box = _text_box(label).padded(self._padding)
            leader = _leader(self._axes, at, box, offset)
            if self._is_free(box, leader):
                self._texts.append(box)
                self._leaders += leader
                return
            label.remove()

    def _is_free(self, box: Bbox, leader: Sequence[XY]) -> bool:
        inside = self._inside
        return (
            inside.x0 <= box.x0 <= box.x1 <= inside.x1
            and inside.y0 <= box.y0 <= box.y1 <= inside.y1
            and not any(box.overlaps(other) for other in (*self._taken, *self._texts))
            and not any(box.contains(*point) for point in self._leaders)
            and not any(text.contains(*point) for text in self._texts for point in leader)
        )


def _offsets() -> Iterator[XY]:
    """Offsets of a label's anchor from its point, in points, the nearest first."""
    for level in range(_LEVELS):
        rise = _GAP_POINTS + level * _LEVEL_POINTS
        for side in (0.0, 1.0, -1.0):
            for up in (1.0, -1.0):
                yield side * _GAP_POINTS * (level + 1), up * rise


def _write(axes: Axes, at: XY, text: str, offset: XY) -> Annotation:
    dx, dy = offset
    label = axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        fontsize=7.5,
        color=INK,
        zorder=3,
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="bottom" if dy > 0 else "top",
        arrowprops={
            "arrowstyle": "-",
            "color": "#9A9A9A",
            "linewidth": 0.5,
            "shrinkA": 0,
            "shrinkB": 3,
            "relpos": _anchor(offset),
        },
        bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none"},
    )
    label.set_in_layout(False)
    return label


def _anchor(offset: XY) -> XY:
    """The corner or edge of a label that looks at its point, as parts of the text's box."""
    dx, dy = offset
    return (0.0 if dx > 0 else 1.0 if dx < 0 else 0.5), (0.0 if dy > 0 else 1.0)


def _leader(axes: Axes, at: XY, box: Bbox, offset: XY) -> list[XY]:
    """Points on the line between a label and its point, in pixels."""
    x, y = axes.transData.transform(at)
    right, up = _anchor(offset)
    to_x, to_y = box.x0 + right * box.width, box.y0 + up * box.height
    parts = [step / _LEADER_SAMPLES for step in range(_LEADER_SAMPLES + 1)]
    return [(x + part * (to_x - x), y + part * (to_y - y)) for part in parts]


def _text_box(label: Annotation) -> Bbox:
    """Where the text is; the annotation's own extent would hold its line too."""
    from matplotlib.text import Text

    label.get_window_extent()  # puts the text in its place
    return Text.get_window_extent(label)


def _marker_box(axes: Axes, at: XY, diameter: float) -> Bbox:
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform(at)
    half = diameter / 2
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _line_boxes(axes: Axes, corners: Sequence[XY]) -> list[Bbox]:
    from matplotlib.transforms import Bbox

    pixels = [axes.transData.transform(corner) for corner in corners]
    return [
        Bbox.from_extents(min(x, to_x), min(y, to_y), max(x, to_x), max(y, to_y))
        for (x, y), (to_x, to_y) in pairwise(pixels)
    ]
