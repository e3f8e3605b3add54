"""Draws docs/dual-limits.svg from the rates that docs/dual-limits.sh measures: unsafe answers and over-refusal by step, one panel an arm."""

import json
import sys
from collections import defaultdict

W, H, LEFT, TOP, GAP = 330, 200, 46, 44, 40
ARMS = [("both", "both limits"), ("first", "only the limit on unsafe answers")]
COSTS = [("unsafe", "unsafe answers", "#b3364c"), ("overref", "over-refusal", "#1b6ca8")]
LIMIT = 0.05


def main(source: str, target: str) -> None:
    rates = defaultdict(list)
    for line in open(source):
        row = json.loads(line)
        for name, _, _ in COSTS:
            rates[row["arm"], name, row["step"]].append(row["costs"][name]["mean"])
    steps = sorted({step for _, _, step in rates})
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * (LEFT + W) + GAP + 20} {H + TOP + 44}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for panel, (arm, title) in enumerate(ARMS):
        x0 = LEFT + panel * (LEFT + W + GAP)
        x = lambda step: x0 + W * step / steps[-1]
        y = lambda rate: TOP + H * (1 - rate)
        out.append(f'<text x="{x0}" y="20" font-weight="bold">{title}</text>')
        for tenth in range(0, 11, 2):
            out.append(f'<line x1="{x0}" x2="{x0 + W}" y1="{y(tenth / 10):.1f}" y2="{y(tenth / 10):.1f}" stroke="#ddd"/>')
            out.append(f'<text x="{x0 - 6}" y="{y(tenth / 10) + 4:.1f}" text-anchor="end" fill="#555">{tenth * 10} %</text>')
        for step in steps[::2]:
            out.append(f'<text x="{x(step):.1f}" y="{TOP + H + 18}" text-anchor="middle" fill="#555">{step}</text>')
        out.append(f'<text x="{x0 + W / 2}" y="{TOP + H + 36}" text-anchor="middle" fill="#555">learner step</text>')
        out.append(f'<line x1="{x0}" x2="{x0 + W}" y1="{y(LIMIT):.1f}" y2="{y(LIMIT):.1f}" stroke="#333" stroke-dasharray="4 3"/>')
        for place, (name, label, colour) in enumerate(COSTS):
            band = [(step, rates[arm, name, step]) for step in steps if rates[arm, name, step]]
            edge = [f"{x(s):.1f},{y(max(v)):.1f}" for s, v in band] + [f"{x(s):.1f},{y(min(v)):.1f}" for s, v in reversed(band)]
            line = " ".join(f"{x(s):.1f},{y(sum(v) / len(v)):.1f}" for s, v in band)
            out.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="0.15"/>')
            out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            out.append(f'<text x="{x0 + 8 + 130 * place}" y="{TOP - 8}" fill="{colour}">{label}</text>')
    out.append("</svg>\n")
    open(target, "w").write("\n".join(out))


main(*sys.argv[1:])
