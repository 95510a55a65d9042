"""The figure of a benchmark: tokens a second beside a peer's, and shares of the matmul ceiling."""

from collections.abc import Mapping
from pathlib import Path

from rlhf_jax.evaluation.figures import GREY, PALETTE, panel_grid, save, style


def speed_figure(
    speeds: Mapping[str, float], peers: Mapping[str, float], used: Mapping[str, float], path: str | Path
) -> Path:
    """Draws bars of tokens a second by row, with the peer's figures as marks, and of MFU.

    Args:
        speeds: tokens a second.
        peers: the same of a peer, for some rows or none.
        used: MFU, from 0 to 1.
        path: of the PNG file.

    Returns:
        The path.
    """
    with style():
        figure, ((left, right),) = panel_grid(1, 2, 9.0, 0.8 + 0.35 * max(len(speeds), len(used)))
        names = list(speeds)
        left.barh(names, list(speeds.values()), color=PALETTE[1], height=0.6, label="here")
        known = [name for name in names if name in peers]
        if known:
            left.scatter([peers[name] for name in known], known, color=PALETTE[0], marker="D", zorder=3, label="peer")
            left.legend()
        left.set_xscale("log")
        left.set_xlabel("tokens a second")
        right.barh(list(used), [100 * share for share in used.values()], color=GREY, height=0.6)
        right.set_xlabel("MFU (% of the measured matmul ceiling)")
        for panel in (left, right):
            panel.invert_yaxis()
            panel.grid(axis="y", visible=False)
        return save(figure, path)
