"""The table and the plot of compare_memory.py."""

from pathlib import Path

from _measuring import table
from _memory_formula import MODES, OURS, SHORT, Figure, Load

from es_lite.quantities import GIB


def ratio(figures: dict[str, Figure], mode: str) -> float:
    """AdamW's memory over that of `mode`: both measured if both were measured, else both computed."""
    pair = figures["adamw"], figures[mode]
    above, below = [f.measured for f in pair] if all(f.measured for f in pair) else [f.computed for f in pair]
    assert above and below
    return above / below


def report(sizes: dict[str, dict[str, Figure]]) -> str:
    """Markdown: GiB by size and mode, measured ones in bold, and AdamW's over each; how far the formula is off."""
    titles = [name for name, _ in MODES.values()]
    rows = [["size", "parameters", *titles, *(f"AdamW over {SHORT[mode]}" for mode in OURS)]]
    checks = [["measured", "GiB", "by formula", "formula over measured", "most of it, by formula"]]
    for size, figures in sizes.items():
        cells = [f"**{f.best / GIB:.2f}**" if f.measured else f"{f.best / GIB:.2f}" for f in figures.values()]
        rows.append([size, f"{figures['adamw'].parameters:,}", *cells, *(f"{ratio(figures, mode):.1f} times" for mode in OURS)])
        for f in (f for f in figures.values() if f.measured):
            values = f"{f.best / GIB:.2f}", f"{f.computed / GIB:.2f}", f"{f.computed / f.best:.3f}"
            checks.append([f"{size}, {MODES[f.mode][0]}", *values, f.largest])
    tables = [table(rows), table(checks)]
    return "\n\n".join(["Peak memory in GiB: measured (PSS) in bold, else by formula.", *tables[: 1 + (len(checks) > 1)]])


def draw(sizes: dict[str, dict[str, Figure]], memory_gib: float, load: Load, out: Path) -> None:
    """Writes the PNG. Raises OSError."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    grey, width = "#6b6b6b", 0.86 / len(MODES)
    style = {"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with plt.rc_context(style | {"figure.constrained_layout.use": True, "hatch.linewidth": 0.8}):
        figure, axes = plt.subplots(figsize=(max(9.0, 2.6 * len(sizes)), 8), dpi=100)
        top = max(f.best for figures in sizes.values() for f in figures.values()) / GIB
        for place, figures in enumerate(sizes.values()):
            for number, (mode, (_, colour)) in enumerate(MODES.items()):
                x, f = place + (number - (len(MODES) - 1) / 2) * width, figures[mode]
                solid = {"color": colour} if f.measured else {"facecolor": "white", "edgecolor": colour, "hatch": "////"}
                axes.bar(x, f.best / GIB, 0.9 * width, linewidth=1, **solid)
                axes.text(x, f.best / GIB * 1.04, f"{f.best / GIB:.3g}", ha="center", va="bottom", color=colour, fontsize=9)
            words = "\n".join(f"{ratio(figures, mode):.1f} × {SHORT[mode]}" for mode in OURS)
            axes.text(place, top * 1.6, f"AdamW is\n{words}", ha="center", va="bottom", fontsize=9.5, color=grey)
        axes.axhline(memory_gib, color=grey, linestyle=":", linewidth=1.3)
        axes.text(-0.48, memory_gib * 1.03, f"memory of this machine, {memory_gib:g} GiB", color=grey, va="bottom", fontsize=9)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(ylabel="peak memory, all processes (GiB)", ylim=(None, top * 5), xlim=(-0.55, len(sizes) - 0.45))
        names = [f"{size}\n{figures['adamw'].parameters / 1e9:.3g} G parameters" for size, figures in sizes.items()]
        axes.set_xticks(range(len(sizes)), names)
        axes.set_title(
            f"Training memory: {load.micro_batch} × {load.length} tokens a micro-batch, es_lite with {load.workers} workers",
            loc="left", fontweight="bold", fontsize=12.5,
        )  # fmt: skip
        legend = [Patch(color=colour, label=name) for name, colour in MODES.values()]
        legend += [Patch(facecolor=grey, label="measured (PSS)")]
        legend += [Patch(facecolor="white", edgecolor=grey, hatch="////", label="by formula")]
        figure.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=9.5)
        figure.savefig(out, format="png")
        plt.close(figure)
