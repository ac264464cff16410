"""A bar chart as an SVG file, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 900
LABEL_WIDTH = 300
RIGHT_MARGIN = 70
TOP = 96
BAR = 15
GROUP_GAP = 14


@dataclass(frozen=True, slots=True)
class Group:
    """One line of the chart: a label and a value per series, None where there is none."""

    label: str
    values: tuple[float | None, ...]


def bar_chart(
    title: str,
    subtitle: str,
    series: Sequence[tuple[str, str]],
    groups: Sequence[Group],
    reference: tuple[float, str],
) -> str:
    """The text of an SVG file with horizontal bars.

    *series* are ``(name, colour)``; *reference* is the value of a line that all bars are measured
    against, and its name. All values must be finite and not negative.
    """
    values = [value for group in groups for value in group.values if value is not None]
    top_value = max([*values, reference[0]]) * 1.05 or 1.0
    plot_width = WIDTH - LABEL_WIDTH - RIGHT_MARGIN
    group_height = BAR * len(series) + GROUP_GAP
    bottom = TOP + group_height * len(groups)

    def x_of(value: float) -> float:
        return LABEL_WIDTH + plot_width * value / top_value

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 40}" '
        f'width="{WIDTH}" height="{bottom + 40}" font-family="sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{bottom + 40}" fill="#ffffff"/>',
        f'<text x="20" y="28" font-size="19" fill="#1a1a1a">{escape(title)}</text>',
        f'<text x="20" y="48" fill="#555555">{escape(subtitle)}</text>',
    ]
    at = 20
    for name, colour in series:
        out.append(f'<rect x="{at}" y="62" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{at + 18}" y="73" fill="#1a1a1a">{escape(name)}</text>')
        at += 46 + 8 * len(name)
    for tick in _ticks(top_value):
        x = x_of(tick)
        out.append(
            f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="#e4e4e4"/>'
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555555">{tick:g}</text>'
        )
    for i, group in enumerate(groups):
        y = TOP + i * group_height
        middle = y + BAR * len(series) / 2 + 4.5
        out.append(
            f'<text x="{LABEL_WIDTH - 12}" y="{middle:.1f}" text-anchor="end" fill="#1a1a1a">'
            f"{escape(group.label)}</text>"
        )
        for j, value in enumerate(group.values):
            if value is None:
                continue
            width = x_of(value) - LABEL_WIDTH
            out.append(
                f'<rect x="{LABEL_WIDTH}" y="{y + j * BAR}" width="{width:.1f}" height="{BAR - 2}" '
                f'fill="{series[j][1]}"/>'
                f'<text x="{LABEL_WIDTH + width + 5:.1f}" y="{y + j * BAR + 11}" font-size="11" '
                f'fill="#1a1a1a">{value:.2f}</text>'
            )
    x = x_of(reference[0])
    out.append(
        f'<line x1="{x:.1f}" y1="{TOP - 10}" x2="{x:.1f}" y2="{bottom}" stroke="#1a1a1a" '
        f'stroke-dasharray="5 3"/>'
        f'<text x="{x:.1f}" y="{TOP - 14}" text-anchor="middle" fill="#1a1a1a">'
        f"{escape(reference[1])}</text>"
    )
    out.append("</svg>")
    return "\n".join(out) + "\n"


def _ticks(top: float) -> list[float]:
    """Round values from 0 to *top*, about six of them."""
    step = 10.0
    while top / step < 4:
        # 1, 0.5, 0.2, 0.1 ... of each power of ten.
        step = {"1": step / 2, "5": step / 2.5, "2": step / 2}[f"{step:e}"[0]]
    while top / step > 12:
        step *= 2
    return [round(i * step, 6) for i in range(int(top / step) + 1)]
