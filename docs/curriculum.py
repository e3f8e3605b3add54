"""What docs/curriculum.sh needs beside freewheel: makes the pool of which nine in ten prompts teach nothing, reads runs, prints the table, draws the plot."""

import json
import sys
from collections import defaultdict

GOAL = 0.9
POOL, TEACHING = 1200, 120
W, H, LEFT, TOP, GAP = 330, 200, 46, 44, 40
COLOURS = {"uniform": "#777", "informative": "#1b6ca8", "band": "#b3364c"}
TITLES = {"quickstart": "quickstart", "degenerate": "nine in ten teach nothing"}
PANELS = [("quickstart", "rollouts"), ("degenerate", "rollouts"), ("degenerate", "seconds")]


def lines(path):
    return [json.loads(line) for line in open(path)]


def write(path, prompts):
    with open(path, "w") as file:
        for prompt in prompts:
            file.write(json.dumps({key: prompt[key] for key in ("messages", "answer", "tags", "verifier")}) + "\n")


def pool(annotated, others, target, held_out):
    """120 prompts solved sometimes, 540 always, 540 never: their reference answer is wrong. And 300 held-out ones that are none of them."""
    prompts = lines(annotated)
    share = lambda prompt: prompt["meta"]["avg@16"]
    sometimes = [p for p in prompts if 0 < share(p) < 1][:TEACHING]
    always = [p for p in prompts if share(p) == 1][: (POOL - TEACHING) // 2]
    taken = {json.dumps(p["messages"]) for p in sometimes + always}
    free = [p for p in prompts if json.dumps(p["messages"]) not in taken]
    never = [{**p, "answer": 1000 + int(p["answer"])} for p in free[: POOL - len(sometimes) - len(always)]]
    every = sometimes + always + never
    print(f"{len(sometimes)} solved sometimes, {len(always)} always, {len(never)} never", file=sys.stderr)
    write(target, every)
    taken = {json.dumps(p["messages"]) for p in prompts}
    write(held_out, [p for p in lines(others) if json.dumps(p["messages"]) not in taken][:300])


def at(points, x):
    """y at x, on the line through points."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def run(name, arm, seed, folder):
    metrics, evals = lines(f"{folder}/metrics.jsonl"), lines(f"{folder}/eval.jsonl")
    series = lambda key: [(0, 0)] + [(line["step"], line[key]) for line in metrics]
    wall, issued, wasted = series("time/wall_s"), series("accounting/issued"), series("accounting/dropped_zero_signal")
    accuracy = [(line["step"], line["eval/heldout/accuracy"]) for line in evals]
    reached = None
    for (s0, a0), (s1, a1) in zip(accuracy, accuracy[1:]):
        if reached is None and a0 < GOAL <= a1:
            reached = s0 + (GOAL - a0) / (a1 - a0) * (s1 - s0)
    end = wall[-1][0] if reached is None else reached
    row = {"pool": name, "arm": arm, "seed": int(seed), "steps": reached, "seconds": reached and at(wall, reached), "rollouts": at(issued, end),
           "zero_signal": at(wasted, end) / at(issued, end), "last": accuracy[-1][1], "curve": [{"accuracy": a, "seconds": at(wall, step), "rollouts": at(issued, step)} for step, a in accuracy]}
    print(json.dumps(row))


def plot(source, target):
    rows = lines(source)
    panels = [(name, unit) for name, unit in PANELS if any(row["pool"] == name for row in rows)]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(panels) * (LEFT + W + GAP)} {H + TOP + 44}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    print("| prompts | selection | steps to 0.9 | seconds to 0.9 | rollouts until then | of those zero-signal |\n|---|---|---|---|---|---|")
    for panel, (name, unit) in enumerate(panels):
        mine = [row for row in rows if row["pool"] == name]
        arms = defaultdict(list)
        for row in mine:
            arms[row["arm"]].append(row)
        x0, most = LEFT + panel * (LEFT + W + GAP), max(point[unit] for row in mine for point in row["curve"])
        x = lambda value: x0 + W * value / most
        y = lambda share: TOP + H * (1 - share)
        out.append(f'<text x="{x0}" y="20" font-weight="bold">{TITLES[name]}, by {unit}</text>')
        for tenth in range(0, 11, 2):
            out.append(f'<line x1="{x0}" x2="{x0 + W}" y1="{y(tenth / 10):.1f}" y2="{y(tenth / 10):.1f}" stroke="#ddd"/>')
            out.append(f'<text x="{x0 - 6}" y="{y(tenth / 10) + 4:.1f}" text-anchor="end" fill="#555">{tenth * 10} %</text>')
        step = next(s for s in (5, 10, 20, 30, 60, 120, 300, 600, 5000, 10000, 20000, 50000) if most / s <= 7)
        for tick in range(0, int(most) + 1, step):
            out.append(f'<text x="{x(tick):.1f}" y="{TOP + H + 18}" text-anchor="middle" fill="#555">{tick}</text>')
        out.append(f'<text x="{x0 + W / 2}" y="{TOP + H + 36}" text-anchor="middle" fill="#555">{unit}</text>')
        for place, (arm, seeds) in enumerate(arms.items()):
            for row in seeds:
                line = " ".join(f"{x(point[unit]):.1f},{y(point['accuracy']):.1f}" for point in row["curve"])
                out.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[arm]}" stroke-width="1.5"/>')
            out.append(f'<text x="{x0 + 8 + 100 * place}" y="{TOP - 8}" fill="{COLOURS[arm]}">{arm}</text>')

            def told(key, digits):
                known = sorted(row[key] for row in seeds if row[key] is not None)
                if not known:
                    return "never"
                never = len(seeds) - len(known)
                note = f", {never} of {len(seeds)} never" if never else ""
                return f"{sum(known) / len(known):.{digits}f} ({known[0]:.{digits}f} to {known[-1]:.{digits}f}{note})"

            if unit == "rollouts":
                print(f"| {name} | `{arm}` | {told('steps', 1)} | {told('seconds', 1)} | {told('rollouts', 0)} | {told('zero_signal', 2)} |")
    out.append("</svg>\n")
    open(target, "w").write("\n".join(out))


{"pool": pool, "run": run, "plot": plot}[sys.argv[1]](*sys.argv[2:])
