"""The SID explorer: residual k-means at work. What each level takes away, which items come under
one prefix, and what is lost.
"""

import functools
import html

import ipywidgets as widgets
import numpy as np

from sidlab.figures.charts import shorten
from sidlab.figures.tables import folded, table
from sidlab.sids.residual_kmeans import ResidualKMeans
from sidlab.sids.table import SidTable
from sidlab.viz.explorer import Explorer
from sidlab.viz.sid_figure import (
    AXES,
    least_shown,
    main_plane,
    prefix_nodes,
    sid_figure,
    typical_words,
)

LEVELS = 4
WIDTHS = (2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
LARGE = 2000  # with more items than this a fit takes longer than a blink


class SidExplorer(Explorer):
    """Fit residual k-means live: a map of what each level leaves, the tree of prefixes, and how
    good the SIDs are.

    Args: `catalogue` with embeddings (default: "planted"); `sample`: how many items the map shows
    at most, drawn at random; `seed` of the k-means; `levels`, `width`, `after`, `axes` set
    controls. While the axes stay, those of the embeddings, items move from where they were to what
    the next level leaves of them. Each width is fitted once, with LEVELS levels: the first L of
    them are those of a fit with L.
    """

    heading = "What do the codes of a semantic ID stand for?"
    exported = "after"

    def __init__(
        self, catalogue=None, *, sample=300, seed=0, levels=3, width=8, after=0, axes=AXES[1]
    ):
        if catalogue is None:
            from sidlab.data.load import load_catalogue

            catalogue = load_catalogue("planted")
        self.catalogue = catalogue
        self.x = catalogue.embeddings
        self.seed = seed
        n = catalogue.n_items
        options = [w for w in WIDTHS if w <= max(2, n // 5)]
        if width not in options:
            raise ValueError(
                f"width={width} is not offered for {n} items; use one of"
                f" {', '.join(map(str, options))}"
            )
        self.shown = np.sort(np.random.default_rng(0).permutation(n)[:sample])
        self.titles = [
            title or f"item {i}" for i, title in enumerate(catalogue.items.title, start=1)
        ]
        # Here, since scikit-learn is slow to import.
        from sklearn.feature_extraction.text import CountVectorizer

        vectorizer = CountVectorizer(binary=True, max_features=2000, dtype=np.float32)
        self.has_word = vectorizer.fit_transform(
            text or title for text, title in zip(catalogue.items.text, self.titles)
        )
        self.words = vectorizer.get_feature_names_out()
        centred = self.x - self.x.mean(axis=0)
        self.reach = 1.1 * max(
            np.sqrt((centred**2).sum(axis=1).mean()), np.abs(centred @ main_plane(centred)).max()
        )
        for name in ("encoder", "codes", "report", "nodes"):
            setattr(self, name, functools.lru_cache(64)(getattr(self, name)))
        super().__init__(
            {
                "levels": widgets.IntSlider(
                    value=levels, min=1, max=LEVELS, description="levels (L)"
                ),
                "width": widgets.SelectionSlider(
                    options=options, value=width, description="codes per level (W)"
                ),
                "after": widgets.IntSlider(
                    value=after, min=0, max=LEVELS, description="map after level"
                ),
                "axes": widgets.Dropdown(options=AXES, value=axes, description="main directions"),
            },
            slow=("levels", "width", "after", "axes") if n > LARGE else (),
        )

    def encoder(self, width: int) -> ResidualKMeans:
        """Fitted with LEVELS levels."""
        return ResidualKMeans(LEVELS, width, self.seed).fit(self.x)

    def codes(self, width: int) -> np.ndarray:
        """int64 [n, LEVELS]"""
        return self.encoder(width).encode(self.x)

    def report(self, levels: int, width: int):
        """`SidTable.report` of the first `levels` levels."""
        return SidTable(self.codes(width)[:, :levels], width).report(self.encoder(width), self.x)

    def nodes(self, levels: int, width: int) -> list[dict]:
        """`prefix_nodes` of the first `levels` levels."""
        return prefix_nodes(self.codes(width)[:, :levels], self.has_word, self.words, self.titles)

    def left(self, level: int, width: int) -> np.ndarray:
        """What the first `level` levels leave of the embeddings, float32 [n, d]; without any level,
        what the mean leaves.
        """
        return self.x - (
            self.encoder(width).decode(self.codes(width)[:, :level])
            if level
            else self.x.mean(axis=0)
        )

    def draw(self):
        levels = self.value("levels")
        width = self.value("width")
        # There is nothing after the last level: the control goes there with it.
        if self.value("after") > levels:
            before = self._quiet
            self._quiet = True
            self.controls["after"].value = levels
            self._quiet = before
        after = self.value("after")
        # Whose codes mark the items: the next ones; at the end the last ones
        level = min(after + 1, levels)
        left = self.left(after, width)
        plane = main_plane(left if self.value("axes") == AXES[0] else self.left(0, width))
        size = np.linalg.norm(left, axis=1)
        code = self.codes(width)[:, level - 1]
        centroids = np.full((width, 2), np.nan)
        if after < levels:
            used = np.unique(code)
            centroids[used] = (
                self.encoder(width).codebooks_[after][used] - (0 if after else self.x.mean(axis=0))
            ) @ plane
        items = [
            ("-".join(map(str, self.codes(width)[i, :levels])), self.titles[i], f"{size[i]:.3f}")
            for i in self.shown
        ]
        hover = [
            f"<b>{html.escape(shorten(title, 60))}</b><br>SID {sid}<br>length {length}"
            for sid, title, length in items
        ]
        what = f"What is left after level {after}" if after else "The embeddings"
        figure = sid_figure(
            left[self.shown] @ plane,
            code[self.shown],
            hover,
            centroids,
            np.sqrt((size**2).mean()),
            self.reach,
            self.nodes(levels, width),
            level,
            f"{what},<br>{'marked by' if after < levels else 'still marked by'} code {level}",
            self.shown,
        )
        # On axes that change with the level a movement would say nothing
        if self.value("axes") == AXES[1]:
            figure.layout.transition = {"duration": 600}
        order = np.lexsort(self.codes(width)[self.shown, :levels].T[::-1])
        return figure, self._text(levels, width, after, level, [items[i] for i in order])

    def _text(self, levels, width, after, level, items):
        report = self.report(levels, width)
        nodes = self.nodes(levels, width)
        n = self.catalogue.n_items
        shared = report["collision_rate"]
        per_level = report["per_level"][:levels]
        least = least_shown(n)
        left = 1 if after == 0 else per_level[after - 1]["reconstruction_error"]
        meters = [
            (
                str(row["level"]),
                _meter(row["utilisation"], f"{row['used']} of {width}"),
                _meter(row["perplexity"] / width, f"{row['perplexity']:.1f}"),
                f"{row['prefixes']:,}",
                f"{row['mean_group']:.1f}",
                _meter(row["reconstruction_error"], f"{row['reconstruction_error']:.1%}"),
            )
            for row in per_level
        ]
        head = (
            "level",
            "used codes",
            "perplexity",
            "prefixes",
            "items per prefix",
            "error (squared length left)",
        )
        code = self.codes(width)[:, level - 1]
        word, share, _ = typical_words(code, self.has_word, self.words)
        count = np.bincount(code, minlength=width)
        codes = [
            (
                c,
                count[c],
                f"{word[c] or '–'} ({share[c]:.0%})" if count[c] else "dead: no item has it",
            )
            for c in range(width)
        ]
        together = [(node["id"], node["items"], node["titles"]) for node in nodes if node["shared"]]
        said = [
            (
                f"<p><b>{levels} level{'s' * (levels > 1)} of {width} codes make {width**levels:,}"
                " possible SIDs."
            ),
            (
                f"{n:,} items have {report['unique_sids']:,} different ones:</b>"
                f" {_meter(shared, f'{shared:.1%}')}"
            ),
            "of the items share theirs with another item.",
            (
                f"A de-duplication digit would have {report['largest_group']} values."
                if shared
                else ""
            ),
            f"After level {after}, {left:.1%} of the squared length of the embeddings is left.",
            (
                "The axes stay when the level changes: each item moves by the centroid that is"
                " subtracted."
                if self.value("axes") == AXES[1]
                else (
                    "The axes change with the level, so a place on one map is another place on the"
                    " next."
                )
            ),
            f"The map shows a random sample of {len(items)} items." if len(items) < n else "",
            f"The tree leaves out prefixes of fewer than {least} items." if least > 1 else "",
            "</p>",
        ]
        return (
            " ".join(said)
            + table(head, meters, escape=False)
            + folded(
                f"Codes of level {level}, with the word that sets their items apart",
                table(("code", "items", "word (share of the code's items that have it)"), codes),
            )
            + folded(
                f"SIDs of several items in the tree: {len(together)}"
                + (", the first 50" if len(together) > 50 else ""),
                table(("SID", "items", "titles"), together[:50]),
            )
            + folded(
                "Items of the map, in the order of the tree",
                table(("SID", "item", "length of what is left"), items),
            )
        )


def _meter(share, shown):
    return (
        f'<span style="white-space: nowrap"><meter min="0" max="1" value="{share:.4f}"'
        f' aria-hidden="true"></meter> {shown}</span>'
    )
