"""Line charts as SVG, from JSONL. Standard library only.

    python3 docs/runs/lines.py out.svg --title T --x step --y train/loss [--log-x] [--smooth 9] NAME=FILE[:key=value,...] ...

One line a NAME=FILE; what follows a colon keeps only the lines of the file with these values, what follows an @ is its y. FILE may be
a pattern of several, and a file may have several points with one x, as with several seeds: then the line is their mean and lies in a band
from the lowest to the highest.
"""

import argparse
import glob
import json
import math

COLOURS = ["#1b6ca8", "#d08a1d", "#2a9d5c", "#b3364c", "#6b4fa0", "#555555", "#1aa3a3", "#8a5a2b"]
LEFT, WIDTH, TOP, HEIGHT = 60, 560, 40, 260


def read(spec, x, y, smooth):
    name, rest = spec.split("=", 1)
    rest, _, own = rest.partition("@")
    y = own or y
    path, _, conditions = rest.partition(":")
    wanted = dict(part.split("=") for part in conditions.split(",") if part)
    at = {}
    for path in sorted(glob.glob(path)):
        points = []
        for line in open(path):
            line = json.loads(line)
            if all(json.dumps(line.get(key)) == value for key, value in wanted.items()) and x in line and y in line:
                points.append((float(line[x]), float(line[y])))
        half = smooth // 2
        for i, (along, _) in enumerate(points):
            window = [q[1] for q in points[max(0, i - half) : i + half + 1]]
            at.setdefault(along, []).append(sum(window) / len(window))
    return name, [(along, sum(values) / len(values), min(values), max(values)) for along, values in sorted(at.items())]


def ticks(low, high):
    step = 10 ** math.floor(math.log10(high - low))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 7)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def main():
    args = argparse.ArgumentParser()
    args.add_argument("out")
    args.add_argument("series", nargs="+")
    for key in ("title", "x", "y"):
        args.add_argument("--" + key, required=True)
    args.add_argument("--log-x", action="store_true")
    args.add_argument("--smooth", type=int, default=1)
    args.add_argument("--low", type=float)
    args.add_argument("--high", type=float)
    args = args.parse_args()
    lines = [read(spec, args.x, args.y, args.smooth) for spec in args.series]
    along = math.log2 if args.log_x else float
    xs = [along(p[0]) for _, points in lines for p in points]
    ys = [value for _, points in lines for p in points for value in p[2:]]
    low = min(ys) if args.low is None else args.low
    high = max(ys) if args.high is None else args.high
    at_x = lambda x: LEFT + WIDTH * (along(x) - min(xs)) / (max(xs) - min(xs))
    at_y = lambda y: TOP + HEIGHT * (1 - (min(max(y, low), high) - low) / (high - low))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 150} {TOP + HEIGHT + 40}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-weight="bold">{args.title}</text>',
        f'<text x="{LEFT + WIDTH}" y="{TOP + HEIGHT + 34}" text-anchor="end" fill="#555">{args.x}</text>',
    ]
    for y in ticks(low, high):
        out.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end" fill="#555">{y:g}</text>')
    marks = sorted({p[0] for _, points in lines for p in points}) if args.log_x else ticks(min(xs), max(xs))
    for x in marks:
        out.append(f'<text x="{at_x(x):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle" fill="#555">{x:g}</text>')
    ends = sorted((at_y(points[-1][1]), i) for i, (_, points) in enumerate(lines))
    label, last = {}, -99.0
    for y, i in ends:
        last = label[i] = max(y, last + 13)
    for i, (name, points) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{at_x(p[0]):.1f},{at_y(p[1]):.1f}" for p in points)
        if any(p[2] < p[3] for p in points):
            around = [(p[0], p[3]) for p in points] + [(p[0], p[2]) for p in reversed(points)]
            band = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in around)
            out.append(f'<polygon points="{band}" fill="{colour}" fill-opacity="0.15"/>')
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        out.append(f'<text x="{LEFT + WIDTH + 6}" y="{label[i] + 4:.1f}" fill="{colour}">{name}</text>')
    open(args.out, "w").write("\n".join(out) + "\n</svg>\n")


main()
