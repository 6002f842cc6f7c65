"""Draws ``architecture.svg``: the rooms of the package on their floors, and what each imports. All arrows run down.

    python docs/draw_architecture.py [ROOT]

A room is a folder of the package or a file beside them. Floors are those of ``tests/test_house.py``, imports are read
from the sources. A line has the colour of the room that is imported; lines to one room join on their way down.
"""

import ast
import importlib.util
import random
import sys
from collections import defaultdict
from itertools import accumulate, chain, combinations, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

PACKAGE, WIDTH, HEIGHT, FLOOR, LANE = "idlora_ext", 2.5, 0.62, 1.45, 0.45
COLOURS = "#1d4ed8 #0f766e #b45309 #64748b #15803d #7c3aed #dc2626 #0891b2 #db2777 #ca8a04 #78350f #65a30d #334155"


def read(root):
    """``{room: floor}``, ``{room: [files, lines]}``, and ``{(importing room, imported room)}``."""
    spec = importlib.util.spec_from_file_location("test_house", root / "tests" / "test_house.py")
    spec.loader.exec_module(house := importlib.util.module_from_spec(spec))
    floors = {room: floor for floor, names in enumerate(house.FLOORS) for room in names.split()}
    sizes, arrows, package = {room: [0, 0] for room in floors}, set(), root / PACKAGE
    for path in package.rglob("*.py"):
        room, *inside = path.relative_to(package).with_suffix("").parts
        text = path.read_text(encoding="utf-8")
        sizes[room] = [sizes[room][0] + 1, sizes[room][1] + len(text.splitlines())]
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in getattr(node, "names", ())] if "Import" in type(node).__name__ else []
            if isinstance(node, ast.ImportFrom):
                place = [PACKAGE, room, *inside][: -node.level or None] if node.level else []
                names = [".".join(filter(None, [*place, node.module, name])) for name in names]
            found = [name.split(".") for name in names if name.startswith(f"{PACKAGE}.")]
            arrows |= {(room, name[1]) for name in found if name[1] in floors and name[1] != room}
    return floors, sizes, arrows


def spread(wanted, widths):
    """The positions nearest to those wanted, in this order, that leave each its width (by pooling neighbours)."""
    offsets, pools = [0, *accumulate((a + b) / 2 for a, b in pairwise(widths))], []
    for x, offset in zip(wanted, offsets, strict=True):
        pools.append((x - offset, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append(((a * n + b * m) / (n + m), n + m))
    return [x + offset for x, offset in zip((x for x, n in pools for _ in range(n)), offsets, strict=True)]


def arrange(floors, steps):
    """``x`` of every room and lane: of many starts, the one with the fewest crossings, then the shortest lines."""
    nodes = sorted({*floors.items(), *chain(*steps)})
    near, chance, best = defaultdict(list), random.Random(0), None
    for upper, lower in sorted(steps):
        near[upper].append(lower)
        near[lower].append(upper)
    for _ in range(200):
        x = {node: chance.uniform(-6, 6) for node in nodes}
        for floor in [*range(max(floors.values()) + 1), *range(max(floors.values()), -1, -1)] * 10:
            wanted = {n: sum(x[m] for m in near[n]) / max(len(near[n]), 1) for n in nodes if n[1] == floor}
            here = sorted(wanted, key=wanted.get)
            widths = [WIDTH + 0.3 if floors[room] == floor else LANE for room, _ in here]
            x |= zip(here, spread([wanted[n] for n in here], widths), strict=True)
        crossed = [a[1] == c[1] and (x[a] - x[c]) * (x[b] - x[d]) < 0 for (a, b), (c, d) in combinations(steps, 2)]
        cost = sum(crossed), sum(abs(x[a] - x[b]) for a, b in steps)
        best = min(best or (cost, x), (cost, x), key=lambda pair: pair[0])
    return best[1]


def draw(floors, sizes, arrows, file):
    steps = set()  # of one floor each: on the floors between, what leads to one room shares a lane
    for above, room in arrows:
        way = [(above, floors[above]), *((room, f) for f in range(floors[above] - 1, floors[room] - 1, -1))]
        steps |= {*pairwise(way)}
    x, top = arrange(floors, steps := sorted(steps)), max(floors.values())
    colour = dict(zip(floors, COLOURS.split() + ["#0f172a"] * len(floors), strict=False))
    left, right = min(x.values()) - WIDTH, max(x.values()) + WIDTH
    axes = plt.figure(figsize=((right - left) * 0.7, (top + 1) * FLOOR * 0.7)).add_axes((0, 0, 1, 1))
    axes.set(xlim=(left, right), ylim=(-0.5 * FLOOR, (top + 0.5) * FLOOR))
    axes.axis("off")
    for floor in range(top + 1):
        axes.axhspan((floor - 0.36) * FLOOR, (floor + 0.36) * FLOOR, color="#f1f5f9", zorder=0)
        axes.text(left + 0.3, floor * FLOOR, floor, color="#94a3b8", fontsize=13, va="center")
    for upper, lower in steps:
        begin, end, start = upper[1] * FLOOR - HEIGHT / 2, lower[1] * FLOOR + HEIGHT / 2 + 0.07, x[upper]
        if floors[upper[0]] == upper[1]:  # what leaves a room leaves side by side
            leaving = sorted((b for a, b in steps if a == upper), key=x.get)
            start += WIDTH * 0.8 * ((leaving.index(lower) + 0.5) / len(leaving) - 0.5)
        points = [(start, begin), (start, (begin + end) / 2), (x[lower], (begin + end) / 2), (x[lower], end)]
        if floors[lower[0]] == lower[1]:
            axes.plot(*points[-1], marker="v", color=colour[lower[0]], zorder=2)
        else:
            points.append((x[lower], end - HEIGHT - 0.07))
        curve = Curve(points, [Curve.MOVETO, *[Curve.CURVE4] * 3, Curve.LINETO][: len(points)])
        axes.add_patch(PathPatch(curve, fc="none", ec=colour[lower[0]], lw=1.6))
    for room, (files, lines) in sizes.items():
        at, y = x[room, floors[room]], floors[room] * FLOOR
        box = {"boxstyle": "round,pad=0,rounding_size=0.1", "fc": "white", "ec": colour[room], "lw": 2, "zorder": 3}
        axes.add_patch(FancyBboxPatch((at - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, **box))
        name, note = (f"{room}/", f"{files} files, ") if files > 1 else (f"{room}.py", "")
        for text, up, style in ((name, 0.11, {"weight": "bold"}), (f"{note}{lines:,} lines", -0.14, {})):
            axes.text(at, y + up, text, ha="center", va="center", fontsize=8.5, zorder=4, **style)
    with plt.rc_context({"svg.hashsalt": PACKAGE}):  # the same file from the same sources
        plt.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent)
    floors, sizes, arrows = read(root)
    if up := [f"{a} imports {b}" for a, b in sorted(arrows) if floors[a] <= floors[b]]:
        sys.exit(f"not on a floor below: {', '.join(up)}")
    draw(floors, sizes, arrows, root / "docs" / "architecture.svg")
