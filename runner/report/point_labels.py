"""Labels next to the points of a picture, where there is room for them."""

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


def place_labels(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[float, float, str]],
    *,
    marker_points: float,
    line: Sequence[XY] = (),
) -> None:
    """Write each label near its point, where it covers neither a point nor an earlier label.

    Points whose markers overlap share the first one's label, with ``+n`` for the others; a label
    that finds no room is left out.

    Args:
        figure: the whole picture, which decides where the axes lie.
        axes: drawn except for the labels.
        labels: x and y in data coordinates and the text, the most important first.
        marker_points: diameter of a point's marker, in points.
        line: corners, in data coordinates, of a line of upright and level pieces that labels
            must not cover either.
    """
    figure.draw_without_rendering()
    pixels_per_point = figure.dpi / 72
    half = marker_points * pixels_per_point / 2
    markers = [_box(axes, (x, y), (x, y)).padded(half) for x, y, _ in labels]
    taken = [*markers, *(_box(axes, *ends) for ends in pairwise(line))]
    padding = _BETWEEN_POINTS * pixels_per_point
    inside = axes.get_window_extent().padded(-padding)
    for index, others in clusters(markers):
        x, y, text = labels[index]
        text = f"{text} +{others}".lstrip() if others else text
        for offset in _offsets() if text else ():
            label = _write(axes, (x, y), text, offset)
            box = _text_box(label).padded(padding)
            is_inside = all(inside.contains(*corner) for corner in (box.min, box.max))
            if is_inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def clusters(markers: Sequence[Bbox]) -> list[tuple[int, int]]:
    """(index of a marker, how many later ones overlap it) for each that no earlier one claims."""
    free = list(range(len(markers)))
    found = []
    while free:
        first, *rest = free
        free = [index for index in rest if not markers[first].overlaps(markers[index])]
        found.append((first, len(rest) - len(free)))
    return found


def _offsets() -> Iterator[XY]:
    """Offsets of a label's anchor from its point, in points, the nearest first."""
    for level in range(_LEVELS):
        rise = _GAP_POINTS + level * _LEVEL_POINTS
        for side in (0.0, 1.0, -1.0):
            for up in (1.0, -1.0):
                yield side * _GAP_POINTS * (level + 1), up * rise


def _write(axes: Axes, at: XY, text: str, offset: XY) -> Annotation:
    """Write a label, with a thin line from its nearest corner or edge to the point."""
    dx, dy = offset
    anchor = (0.0 if dx > 0 else 1.0 if dx < 0 else 0.5), (0.0 if dy > 0 else 1.0)
    label = axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        fontsize=7.5,
        color=INK,
        zorder=3,
        ha={0.0: "left", 0.5: "center", 1.0: "right"}[anchor[0]],
        va="bottom" if dy > 0 else "top",
        arrowprops={
            "arrowstyle": "-",
            "color": "#9A9A9A",
            "linewidth": 0.5,
            "shrinkA": 0,
            "shrinkB": 3,
            "relpos": anchor,
        },
        bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none"},
    )
    label.set_in_layout(False)
    return label


def _text_box(label: Annotation) -> Bbox:
    """Where the text is; the annotation's own extent would include its line."""
    from matplotlib.text import Text

    label.get_window_extent()  # puts the text in its place
    return Text.get_window_extent(label)


def _box(axes: Axes, corner: XY, opposite: XY) -> Bbox:
    """The box in pixels between two points in data coordinates."""
    from matplotlib.transforms import Bbox

    (x, y), (to_x, to_y) = (axes.transData.transform(point) for point in (corner, opposite))
    return Bbox.from_extents(min(x, to_x), min(y, to_y), max(x, to_x), max(y, to_y))
