"""Draws docs/pruning.svg: one user of the planted world, their tokens, which of them are kept, and the next item.

Run `python docs/make_picture.py [file]` to make it anew. Importance is the true information (the oracle scorer), and
the prediction is the exact optimum, so the picture shows what pruning aims at, not what a trained model does.
"""

import html
import os
import pathlib
import sys

import torch

import sidlab
from sidlab.figures.theme import BLUE, FONT, ORANGE
from sidlab.windows import truth_tokens

ITEMS, KEEP = 10, 1 / 3
WIDTH, HEIGHT, LEFT, TOP = 1100, 540, 150, 152  # of the picture; where the grid of tokens starts
COLUMN, ROW, CELL = 92, 42, (80, 34)
PLANTED = ("department", "brand", "kind")
INK, SOFT = "#222222", "#5A5A5A"


def picture() -> str:
    """The SVG."""
    catalogue = sidlab.load_catalogue("planted")
    truth = catalogue.truth
    width = tuple(int(w) for w in truth.tree.max(axis=0) + 1)
    encoder = sidlab.ResidualKMeans(levels=3, width=width, seed=0).fit(catalogue.embeddings)
    table = sidlab.SidTable(encoder.encode(catalogue.embeddings), width=width)
    history, target = choose_user(catalogue)
    shape = (1, ITEMS * table.levels)
    importance = truth_tokens(truth.information([history]), table.levels, False, shape)
    informative = truth_tokens(truth.informative([history]), table.levels, False, shape)[0] > 0
    kept = sidlab.TokenPruner(keep=KEEP).choose(torch.ones(shape), importance)[0]
    names = [f"{'abcdef'[level]}{code}" for item in history for level, code in enumerate(table.codes[item - 1])]
    titles = catalogue.items["title"]
    return draw([titles[item - 1] for item in history], names, kept.tolist(), informative.tolist(), titles[target - 1],
                [f"{'abcdef'[level]}{code}" for level, code in enumerate(table.codes[target - 1])])


def choose_user(catalogue):
    """The first user who shows it all: the optimum names the next item, and needs one from far back to do so."""
    tree = catalogue.truth.tree
    for clicks in catalogue.histories:
        history, target = clicks[-ITEMS - 1 : -1], clicks[-1]
        if len(history) < ITEMS or catalogue.truth.next_item([history])[0].argmax() + 1 != target:
            continue
        alike = (tree[history - 1, :2] == tree[target - 1, :2]).all(axis=1)  # of the same department and brand
        noise = ITEMS - catalogue.truth.informative([history])[0, :, 0].sum()
        if alike[: ITEMS // 3].any() and not alike[ITEMS // 2 :].any() and noise >= 2:
            return history, target
    raise ValueError("no user of the planted catalogue is fit for the picture: loosen choose_user")


def draw(titles, names, kept, informative, next_title, next_names) -> str:
    levels = len(names) // len(titles)
    grid_end, kept_top = TOP + levels * ROW, TOP + levels * ROW + 92
    out = [text(40, 46, "A user's history becomes tokens. Most carry little: keep the third that matters.", 22, "bold"),
           text(40, 72, "A column is an item, oldest first; a cell is one token of its semantic ID.", 15, color=SOFT)]
    for level in range(levels):
        y = TOP + level * ROW + CELL[1] / 2
        out.append(text(40, y - 1, f"level {level + 1}", 14))
        out.append(text(40, y + 14, dict(enumerate(PLANTED)).get(level, ""), 12, color=SOFT))
    stream, cells, lines = [place for place, keeps in enumerate(kept) if keeps], [], []
    small = (46, 30)
    for place, name in enumerate(names):
        item, level = divmod(place, levels)
        x, y = LEFT + item * COLUMN, TOP + level * ROW
        if level == 0:
            cells += [text(x + CELL[0] / 2, TOP - 46 + 15 * n, word, 12, anchor="middle")
                      for n, word in enumerate(titles[item].split(maxsplit=2)[-3:])]
        cells.append(token(x, y, *CELL, name, kept[place], informative[place]))
        if kept[place]:
            start, goal = x + CELL[0] / 2, 40 + stream.index(place) * (small[0] + 6)
            end = goal + small[0] / 2
            curve = f"M{start} {y + CELL[1]}C{start} {kept_top - 46} {end} {grid_end + 40} {end} {kept_top}"
            lines.append(f'<path d="{curve}" fill="none" stroke="{BLUE}" stroke-width="1.5"/>')
            cells.append(token(goal, kept_top, *small, name, True, False))
    out += lines + cells
    out.append(text(40, kept_top + 52, f"{len(names)} tokens become {len(stream)}, in their order;", 14))
    out.append(text(40, kept_top + 70, "every later layer is that much shorter", 14))
    x, middle = 40 + len(stream) * (small[0] + 6) + 6, kept_top + small[1] / 2
    box = (f'<rect x="{x + 40}" y="{middle - 30}" width="132" height="60" rx="10" fill="none" stroke="{INK}" '
           f'stroke-width="1.5"/>')
    out += [arrow(x, x + 34, middle), box, text(x + 106, middle - 4, "later layers", 14, anchor="middle"),
            text(x + 106, middle + 14, "and decoder", 14, anchor="middle"), arrow(x + 178, x + 212, middle)]
    out += [token(x + 220 + n * 52, kept_top, *small, name, True, False) for n, name in enumerate(next_names)]
    out += [text(x + 220, kept_top + 52, "next item:", 14), text(x + 220, kept_top + 70, next_title, 14, "bold")]
    y = HEIGHT - 62
    for x, keeps, star, label in ((40, True, False, "kept"), (150, False, False, "pruned"),
                                  (270, False, True, "truly informative (the planted world knows)")):
        out.append(token(x, y, 32, 22, "", keeps, star) if not star else star_at(x + 14, y + 11, 10))
        out.append(text(x + 40 - 8 * star, y + 16, label, 14))
    out.append(text(40, HEIGHT - 16, "Kept by true information; a scorer such as RASTP's has to guess it. The next "
                    "item is the most probable one, and the one the user chose.", 12, color=SOFT))
    body = "\n".join(out)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"
 role="img" aria-labelledby="title description" font-family="{FONT}">
<title id="title">Pruning the tokens of one history</title>
<desc id="description">{len(titles)} items with {levels} tokens each; {len(stream)} of {len(names)} tokens are kept
(filled), the others pruned (hatched); truly informative tokens carry a star; predicted next item: {next_title}.</desc>
<defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect width="7" height="7" fill="#F4F4F4"/><path d="M0 0V7" stroke="#B5B5B5" stroke-width="2"/></pattern></defs>
<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="#FFFFFF"/>
{body}
</svg>
"""


def token(x, y, width, height, name, keeps, informative):
    fill, stroke, color = (BLUE, BLUE, "#FFFFFF") if keeps else ("url(#hatch)", "#8A8A8A", INK)
    halo = "" if keeps else ' stroke="#F4F4F4" stroke-width="4" paint-order="stroke"'
    label = text(x + width / 2, y + height / 2 + 5, name, 15, anchor="middle", color=color, more=halo) if name else ""
    star = star_at(x + width - 11, y + 10, 7.5) if informative else ""
    state = "kept" if keeps else "pruned"
    return (f'<rect class="{state}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" '
            f'stroke="{stroke}"/>{label}{star}')


def star_at(x, y, radius):
    turn = [complex(0, -1) * complex(0.809017, 0.587785) ** n for n in range(10)]
    points = " ".join(f"{x + p.real * r:.1f},{y + p.imag * r:.1f}"
                      for n, p in enumerate(turn) for r in [radius if n % 2 == 0 else radius * 0.42])
    return f'<polygon class="star" points="{points}" fill="{ORANGE}" stroke="{INK}" stroke-width="0.8"/>'


def arrow(start, end, y):
    return (f'<path d="M{start} {y}H{end}M{end - 8} {y - 6}L{end} {y}L{end - 8} {y + 6}" fill="none" stroke="{INK}" '
            'stroke-width="2"/>')


def text(x, y, words, size, weight="normal", anchor="start", color=INK, more=""):
    return (f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
            f'fill="{color}"{more}>{html.escape(words)}</text>')


if __name__ == "__main__":
    path = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).with_name("pruning.svg"))
    beside = path.with_suffix(".tmp")
    beside.write_text(picture(), encoding="utf-8")
    os.replace(beside, path)
