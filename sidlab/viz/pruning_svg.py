"""The pruning explorer's state as an SVG, for a notebook without a kernel."""

import html
import textwrap

from sidlab.figures.charts import shorten
from sidlab.figures.theme import BLUE, GREY, ORANGE


def without_tags(text):
    return " ".join(
        text.replace("</p><p>", " ")
        .replace("<p>", "")
        .replace("</p>", "")
        .replace("<b>", "")
        .replace("</b>", "")
        .split()
    )


def pruning_svg(state: dict) -> str:
    """A picture of `PruningExplorer.state`, SVG on white: the tokens, those that are kept, the
    list."""
    tokens = state["tokens"]
    levels = len(state["levels"])
    titles = state["items"]["title"]
    informative = tokens["informative"] or [0] * len(tokens["kept"])
    # As large as it goes in few lines.
    size = 22 if len(titles) <= 10 else 15
    step = size + 2
    wide = (size + 2) * levels + 8
    in_line = max(1, 580 // wide)
    parts = []

    def box(token, left, top):
        """One token: 40 pixels high, its bar as high as it is important, its code below."""
        kept = tokens["kept"][token]
        scaled = tokens["scaled"][token]
        color, dash = (BLUE, "") if kept else (GREY, ' stroke-dasharray="3 2"')
        parts.append(
            f'<rect class="{"kept" if kept else "pruned"}" x="{left}" y="{top}" width="{size}" '
            f'height="40" rx="2" fill="{"#fff" if kept else "url(#sidlab-pruned)"}" '
            f'stroke="{color}" stroke-width="1.5"{dash}>'
            f"<title>{_escaped(hover(state, token))}</title></rect>"
        )
        high = round(22 * scaled, 1)
        parts.append(
            f'<path d="M{left + 3} {top + 25}v-{high}h{size - 6}v{high}z" fill="{color}"/>'
        )
        if kept:
            parts.append(f'<path d="M{left} {top + 25}h{size}v15h-{size}z" fill="{color}"/>')
        _write(
            parts,
            left + size / 2,
            top + 36,
            tokens["code"][token],
            10,
            "#fff" if kept else "#222",
            "middle",
        )
        if informative[token]:
            parts.append(
                f'<circle cx="{left + size - 4}" cy="{top + 5}" r="3.5" '
                f'fill="{ORANGE}" stroke="#222"/>'
            )

    _write(parts, 10, 20, state["label"].partition(". The next")[0] + ".", 13)
    _write(parts, 10, 38, "The next" + state["label"].partition(". The next")[2], 13)
    _write(
        parts,
        10,
        58,
        f"All tokens, as the layers up to {state['layer']} read them. "
        "Bar: importance; hatched: pruned; dot: truly informative.",
        11,
    )
    for item, title in enumerate(titles):
        left = 10 + wide * (item % in_line)
        top = 66 + 76 * (item // in_line)
        lines = textwrap.wrap(
            f"{item + 1}. {title}", max(8, int(wide / 6)), max_lines=2, placeholder="…"
        )
        for number, line in enumerate(lines):
            _write(parts, left, top + 10 + 12 * number, line, 10)
        for token in (token for token, of in enumerate(tokens["item"]) if of == item):
            box(token, left + step * tokens["level"][token], top + 27)
    bottom = 66 + 76 * -(-len(titles) // in_line)

    kept = [token for token, flag in enumerate(tokens["kept"]) if flag]
    _write(
        parts,
        10,
        bottom + 14,
        f"After layer {state['layer']} {len(kept)} of {len(tokens['kept'])} tokens are left.",
        11,
    )
    in_row = 580 // step
    for place, token in enumerate(kept):
        box(token, 10 + step * (place % in_row), bottom + 20 + 46 * (place // in_row))
    bottom += 24 + 46 * -(-len(kept) // in_row)

    for place, (item, title, move) in enumerate(
        zip(state["list"]["after"], state["list"]["title"], state["list"]["moved"]), start=1
    ):
        target = item == state["target"]["item"]
        top = 58 + 22 * place
        if target:
            parts.append(
                f'<path d="M606 {top - 15}h284v21h-284z" fill="{ORANGE}" fill-opacity="0.25"/>'
            )
        _write(parts, 628, top, str(place), 12, "#595959", "end")
        _write(parts, 636, top, shorten(f"{'★ ' * target}{title}", 34), 12)
        _write(parts, 886, top, move, 12, "#595959", "end")
    _write(parts, 610, 58, "recommended", 11)
    height = max(bottom, 70 + 22 * len(state["list"]["after"]))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height}" width="900" '
        f'height="{height}" role="img" aria-label="{_escaped(state["label"])}" '
        'font-family="system-ui, sans-serif" style="max-width: 100%; height: auto">'
        '<defs><pattern id="sidlab-pruned" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)">'
        f'<path d="M0 0h5v5h-5z" fill="#fff"/><path d="M0 0v5" stroke="{GREY}"/></pattern></defs>'
        f'<path d="M0 0h900v{height}h-900z" fill="#fff"/>{"".join(parts)}</svg>'
    )


def hover(state: dict, token: int) -> str:
    """What is said of a token, as `pruning.js` says it."""
    tokens = state["tokens"]
    kept = "kept" if tokens["kept"][token] else "pruned"
    return f"{tokens['name'][token]}: code {tokens['code'][token]}, {kept}, {tokens['fact'][token]}"


def _write(parts, x, y, text, size, color="#222", anchor="start"):
    parts.append(
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}">'
        f"{_escaped(text)}</text>"
    )


def _escaped(text):
    """For XML, which knows no control characters."""
    return html.escape("".join(letter for letter in text if letter.isprintable()))
