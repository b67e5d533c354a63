"""Predictions, quizzes, records, and every check: right solutions written here pass it, and the
classic mistakes are named.
"""

import json
import math

import numpy as np
import pandas as pd
import plotly.express as px
import pytest
import torch

from sidlab.course import checks, teach
from sidlab.map_loss import MapConfig
from sidlab.sids.table import SidTable
from sidlab.windows import Collator, Windows


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("SIDLAB_UNATTENDED", raising=False)
    monkeypatch.delenv("SIDLAB_RECORD", raising=False)
    monkeypatch.setattr(checks, "CHECKS", dict(checks.CHECKS))
    teach.reset()
    yield
    teach.reset()


# --- checks: independent solutions ----------------------------------------------------------------


def residual_codes(x, codebooks):
    codes = []
    for vector in x:
        left = vector.copy()
        row = []
        for book in codebooks:
            row.append(min(range(len(book)), key=lambda w: float(np.linalg.norm(left - book[w]))))
            left = left - book[row[-1]]
        codes.append(row)
    return np.array(codes)


def collisions(codes):
    sids = [tuple(row) for row in codes.tolist()]
    return sum(sids.count(sid) > 1 for sid in sids) / len(sids)


def perplexity(codes, width):
    share = torch.bincount(torch.as_tensor(codes), minlength=width) / len(codes)
    return torch.distributions.Categorical(share).entropy().exp()


def centrality(attention, mask):
    out = torch.zeros(mask.shape)
    for b, h, query in np.ndindex(attention.shape[:3]):
        if mask[b, query]:
            out[b] += attention[b, h, query]
    return out


def importance(centrality, hidden, mask):
    return torch.where(mask == 1, centrality * hidden.abs().sum(-1), -math.inf)


def count(n, keep):
    return min(n, max(1, math.ceil(keep * n - 1e-6)))


def keep_top(importance, mask, keep):
    out = []
    for row, real in zip(importance.tolist(), mask.tolist()):
        places = [p for p in range(len(row)) if real[p]]
        out.append(sorted(sorted(places, key=lambda p: -row[p])[: count(len(places), keep)]))
    return out


def map_labels(items, target, steps):
    return (items[target + 1 :] + [None] * steps)[:steps]


def map_loss(step_losses, labels):
    means = []
    for s in range(labels.shape[1]):
        values = [
            float(loss)
            for loss, label in zip(step_losses[:, s].flatten(), labels[:, s].flatten())
            if label != -100
        ]
        if values:
            means.append(sum(values) / len(values))
    return sum(means) / len(means) if means else 0.0


def nearest_share(vectors, codes):
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)
    nearest = torch.cdist(unit, unit).fill_diagonal_(math.inf).argmin(1).numpy()
    return (codes[nearest, 0] == codes[:, 0]).mean()


SOLUTIONS = {
    "residual_codes": residual_codes,
    "collisions": collisions,
    "perplexity": perplexity,
    "centrality_of": centrality,
    "saliency_of": lambda hidden: hidden.abs().sum(-1),
    "importance_of": importance,
    "kept_count": count,
    "keep_top": keep_top,
    "map_labels": map_labels,
    "map_loss": map_loss,
    "gather": lambda hidden, positions: torch.stack(
        [row[places] for row, places in zip(hidden, positions)]
    ),
    "recall_at_k": lambda ranks, k: sum(1 <= rank <= k for rank in ranks.tolist()) / len(ranks),
    "ndcg": (
        lambda ranks, k: (
            sum(1 / math.log2(1 + rank) for rank in ranks.tolist() if 1 <= rank <= k) / len(ranks)
        )
    ),
    "real_tokens": (
        lambda lengths, max_items, tokens: (
            sum(min(n, max_items) * tokens for n in lengths) / (len(lengths) * max_items * tokens)
        )
    ),
    "attention_flops": lambda n, d: 2 * (n * d * n) + 2 * (n * n * d),
    "crossover": lambda d, f: next(
        n for n in range(1, 10_000) if 4 * n * n * d >= 8 * n * d * d + 4 * n * d * f
    ),
    "lost_share": (
        lambda lengths, keep: (
            1
            - sum(min(5 * n, math.floor(keep * 150 + 1e-6), 150) for n in lengths)
            / sum(min(5 * n, 150) for n in lengths)
        )
    ),
    "trie_nodes": lambda codes: [
        len({tuple(row[: level + 1]) for row in codes.tolist()}) for level in range(codes.shape[1])
    ],
    "codes_only": (
        lambda signals: (signals.hidden.abs().sum(-1) * signals.centrality).masked_fill(
            signals.item_index * 4 + 3 == signals.positions, -math.inf
        )
    ),
    "nearest_share": nearest_share,
    "relative_centrality": lambda votes, mask: torch.stack(
        [row * real / row[real == 1].mean() for row, real in zip(votes, mask)]
    ),
    "paired_interval": lambda a, b, users: np.percentile(
        [a[drawn].mean() - b[drawn].mean() for drawn in users], [2.5, 97.5]
    ),
}


def test_every_check_has_a_solution_here():
    assert list(checks.CHECKS) == list(SOLUTIONS)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_independent_solution_passes(name):
    result = teach.check(name, SOLUTIONS[name])
    assert result.passed and result.verdict in ("exact", "close") and result.hint == "", result


@pytest.mark.parametrize(
    ("name", "message"),
    [(name, message) for name in SOLUTIONS for message in checks.CHECKS[name].mistakes],
)
def test_every_variant_of_every_mistake_fails_and_is_named(name, message):
    mistake = checks.CHECKS[name].mistakes[message]
    for variant in [mistake] if callable(mistake) else mistake:
        result = teach.check(name, variant)
        assert not result.passed and result.hint == message, result


def top_unsorted(importance, mask, keep):
    return [
        row.topk(count(int(real.sum()), keep)).indices.tolist()
        for row, real in zip(importance, mask)
    ]


def top_of_padded(importance, mask, keep):
    k = math.ceil(keep * mask.shape[1])
    return [
        sorted(p for p in row.tolist() if real[p])
        for row, real in zip(importance.topk(k).indices, mask)
    ]


# The classics, written as a student would write them: (check, function, words of the hint).
CLASSICS = [
    (
        "residual_codes",
        lambda x, books: np.stack(
            [np.linalg.norm(x[:, None] - book, axis=-1).argmin(1) for book in books], 1
        ),
        "same vector",
    ),
    (
        "collisions",
        lambda codes: 1 - len({tuple(row) for row in codes.tolist()}) / len(codes),
        "distinct / items",
    ),
    (
        "perplexity",
        lambda codes, width: (
            2.0
            ** torch.distributions.Categorical(
                torch.bincount(torch.tensor(codes)) / len(codes)
            ).entropy()
        ),
        "undoes log2",
    ),
    (
        "centrality_of",
        lambda attention, mask: torch.einsum("bhqk->bq", attention),
        "attention given",
    ),
    ("centrality_of", lambda attention, mask: torch.einsum("bhqk->bk", attention), "Padding votes"),
    ("saliency_of", lambda hidden: (hidden**2).sum(-1).sqrt(), "L2 norm"),
    (
        "importance_of",
        lambda centrality, hidden, mask: torch.where(
            mask == 1, centrality * hidden.norm(dim=-1), -math.inf
        ),
        "L2 norm",
    ),
    (
        "importance_of",
        lambda centrality, hidden, mask: centrality * hidden.abs().sum(-1) * mask,
        "-inf",
    ),
    ("kept_count", lambda n, keep: int(n * keep), "floor"),
    ("kept_count", lambda n, keep: n and max(1, int(n * keep)), "floor"),
    ("kept_count", lambda n, keep: math.ceil(keep * n), "1e-6"),
    ("keep_top", top_unsorted, "sort them ascending"),
    (
        "keep_top",
        lambda importance, mask, keep: [
            list(range(len(row))) for row in top_unsorted(importance, mask, keep)
        ],
        "positions are lost",
    ),
    ("keep_top", top_of_padded, "padded length"),
    (
        "map_labels",
        lambda items, target, steps: (items[target:] + [None] * steps)[:steps],
        "one too early",
    ),
    ("map_labels", lambda items, target, steps: items[target + 1 :][:steps], "left out"),
    ("map_loss", lambda losses, labels: losses[labels != -100].mean(), "all labels at once"),
    ("gather", lambda hidden, positions: hidden[:, : positions.shape[1]], "positions are lost"),
    ("recall_at_k", lambda ranks, k: (ranks <= k).mean(), "Rank 0"),
    (
        "ndcg",
        lambda ranks, k: np.mean([1 / math.log2(2 + r) if 1 <= r <= k else 0 for r in ranks]),
        "counted from 0",
    ),
    (
        "real_tokens",
        lambda lengths, max_items, tokens: sum(lengths) / len(lengths) / max_items,
        "counted whole",
    ),
    ("attention_flops", lambda n, d: n * n * d * 2, "two products"),
]


@pytest.mark.parametrize(("name", "mistaken", "words"), CLASSICS)
def test_classic_mistakes_are_named(name, mistaken, words):
    result = teach.check(name, mistaken)
    assert not result.passed and words in result.hint, result


def test_map_labels_are_those_of_the_training_batches():
    # The oracle of this check is its own; the collator of the package must agree with it.
    for items, target, steps in checks.CHECKS["map_labels"].inputs:
        if target == 0:
            continue  # no window: there is no history before it
        # One level: token = item + 2
        table = SidTable(np.arange(max(items))[:, None], width=max(items))
        windows = Windows([np.array(items)], max_items=10)
        collate = Collator(
            windows, table, separators=False, max_items=10, map_config=MapConfig(steps=steps)
        )
        labels = collate([target - 1])["map_labels"][0, :, 0].tolist()
        assert [None if label == -100 else label - 2 for label in labels] == checks.CHECKS[
            "map_labels"
        ].oracle(items, target, steps)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_stub_is_not_started(name):
    def stub(*arguments):
        raise NotImplementedError("your turn")

    result = teach.check(name, stub)
    assert (result.passed, result.verdict) == (False, "not started")
    assert teach.checks() == [{"name": name, "passed": False, "verdict": "not started"}]
    assert str(result).startswith(
        f"– {name}: not started. Write your code in place of the line that raises"
    )


def test_what_the_function_raises_is_the_verdict():
    def broken(hidden):
        rows = hidden[99]
        return rows

    result = teach.check("saliency_of", broken)
    assert not result.passed and result.verdict.startswith(
        "raised IndexError: index 99 is out of bounds"
    )
    assert "rows = hidden[99]" in result.hint
    assert teach.check("saliency_of", lambda: 1).hint == "Arguments it gets: 1."


@pytest.mark.parametrize(
    ("mine", "verdict", "words"),
    [
        (
            lambda hidden: hidden,
            "wrong shape",
            "Expected the shape [3, 9], got the shape [3, 9, 8]",
        ),
        (lambda hidden: None, "wrong shape", "is there a `return`?"),
        (lambda hidden: {"a": 1}, "wrong shape", "got dict"),
        (lambda hidden: 1.0, "wrong shape", "got a number"),
        (
            lambda hidden: hidden.abs().sum(-1) + 0.25,
            "max difference 0.25",
            "27 of 27 numbers differ",
        ),
        (lambda hidden: hidden.abs().sum(-1) * torch.nan, "max difference inf", "nan"),
        (lambda hidden: hidden.abs().sum(-1).double() + 1e-7, "close", ""),
        (lambda hidden: hidden.double().abs().sum(-1).tolist(), "close", ""),
        (lambda hidden: hidden.norm(p=1, dim=-1), "exact", ""),
    ],
)
def test_verdicts(mine, verdict, words):
    result = teach.check("saliency_of", mine)
    assert result.verdict == verdict and words in result.hint, result
    assert result.passed == (verdict in ("exact", "close"))


def test_infinite_and_whole_numbers_are_not_close_to_others():
    teach.register("minus infinity", [()], lambda: [-math.inf, 1.0], {})
    assert teach.check("minus infinity", lambda: [-1e30, 1.0]).verdict == "max difference inf"
    assert teach.check("minus infinity", lambda: [-math.inf, 1.0000001]).verdict == "close"
    mixed = teach.check("minus infinity", lambda: [-1e30, 1.0000001])
    # Not the one that is close
    assert mixed.hint == "1 of 2 numbers differ; the first of them is -1e+30, and -inf is right."
    teach.register("also", [()], lambda: [1.0, -math.inf], {})
    assert (
        teach.check("also", lambda: [1.0000001, 0.0]).hint
        == "1 of 2 numbers differ; the first of them is 0.0, and -inf is right."
    )
    teach.register("big", [()], lambda: 10_000_000, {})
    assert teach.check("big", lambda: 10_000_001).verdict == "max difference 1"
    assert teach.check("big", lambda: 1e7).verdict == "exact"


def test_the_largest_difference_over_all_inputs_is_told():
    teach.register("double", [(1,), (4,), (2,)], lambda x: 2.0 * x, {})
    result = teach.check("double", lambda x: x**2)
    assert (result.verdict, result.hint) == (
        "max difference 8",
        "Input 2 of 3: 1 of 1 numbers differ; the first of them is 16, and 8.0 is right.",
    )
    assert teach.check("double", lambda x: x + 1e-7 + x).verdict == "close"


def test_ragged_results_with_other_lengths_have_the_wrong_shape():
    result = teach.check("keep_top", lambda importance, mask, keep: [[0, 1, 2], [0], [0]])
    assert result.verdict == "wrong shape"
    assert (
        result.hint
        == "Input 1 of 2: Expected 3 parts of the shapes [3], [2], [1], got 3 parts of the shapes"
        " [3], [1], [1]."
    )


def test_a_function_cannot_spoil_the_inputs_of_the_next():
    def in_place(hidden):
        return hidden.abs_().sum(-1)

    assert teach.check("saliency_of", in_place).passed
    assert checks.CHECKS["saliency_of"].inputs[0][0].min() < 0
    assert teach.check("saliency_of", lambda hidden: hidden.sum(-1)).hint.startswith(
        "This sums the values with their signs"
    )


def test_own_checks_take_functions_and_values():
    teach.register(
        "answer", [()], lambda: 42, {"This is the question.": [lambda: 6 * 9, lambda: 6 * 8]}
    )
    assert teach.check("answer", 42).verdict == "exact"
    assert teach.check("answer", lambda: 42).passed
    assert (
        teach.check("answer", 54).hint == teach.check("answer", 48).hint == "This is the question."
    )
    assert [made["passed"] for made in teach.checks()] == [True, True, False, False]
    with pytest.raises(
        ValueError, match=r"inputs must be a list with at least one tuple of arguments, got \[1\]"
    ):
        teach.register("wrong", [1], lambda x: x, {})
    with pytest.raises(
        ValueError, match="runs your function on 9 inputs: pass the function itself, got 3"
    ):
        teach.check("kept_count", 3)
    with pytest.raises(
        ValueError, match=r"name='centralty' is no check; use one of residual_codes, .*, answer"
    ):
        teach.check("centralty", len)


def test_a_check_shows_itself_escaped_and_in_words():
    teach.register("a<b", [()], lambda: 1, {"Use <b>.": lambda: 2})
    bad = teach.check("a<b", lambda: 2)
    good = teach.check("a<b", lambda: 1)
    assert str(bad) == repr(bad) == "✗ a<b: not passed, max difference 1. Use <b>."
    assert (
        bad._repr_html_() == '<p role="status" style="overflow-wrap: anywhere"><b>✗ a&lt;b:</b> '
        "not passed, max difference 1. Use &lt;b&gt;.</p>"
    )
    assert str(good) == "✓ a<b: passed, exact."
    assert "is there a <code>return</code>?" in teach.check("a<b", lambda: None)._repr_html_()


# --- predictions ----------------------------------------------------------------------------------


def labels(widget):
    if isinstance(widget, teach.widgets.Box):
        return [label for part in widget.children for label in labels(part)]
    return (
        [widget.description]
        if hasattr(widget, "disabled") and not isinstance(widget, teach.widgets.HTML)
        else []
    )


def shown(asked):
    """What stands below the truth: {MIME type: content} one after the other."""
    assert all(output["output_type"] == "display_data" for output in asked.more.outputs)
    return [
        {kind: content for kind, content in output["data"].items() if content}
        for output in asked.more.outputs
    ]


def committed(*arguments, answer, **options):
    asked = teach.predict(*arguments, **options)
    asked.answer.value = answer
    asked.commit.click()
    return asked


def test_choice_is_committed_by_the_button():
    calls = []
    asked = teach.predict(
        "Which <one>?", lambda: calls.append(1) or "b", choices=["a", "b", "c"], explain="b is < c"
    )
    assert asked.result.value == "" and not calls and asked.answer.value is None
    assert labels(asked) == ["Your answer", "How sure are you, in percent?", "Commit"]
    assert (asked.confidence.min, asked.confidence.max) == (34, 100)
    assert "Which &lt;one&gt;?" in asked.children[0].value
    asked.commit.click()
    assert "Choose an answer first" in asked.result.value and not asked.committed and not calls
    asked.answer.value = 0
    asked.confidence.value = 70
    asked.commit.click()
    assert calls == [1] and asked.committed
    assert asked.answer.disabled and asked.confidence.disabled
    assert labels(asked) == [
        "Your answer",
        "How sure are you, in percent?",
        "Committed",
        "Answer anew",
    ]
    for words in (
        'role="status"',
        "✗ Wrong.",
        "You said “a” (70 % sure); the truth is “b”.",
        "b is &lt; c",
        "So far: 0 of 1 right, mean stated confidence 70 %.",
    ):
        assert words in asked.result.value
    asked.commit.click()
    assert calls == [1] and teach.score()["choices"] == 1


def test_range_is_committed_by_the_button():
    asked = teach.predict("How many?", 12_345.0, range=(0, 20_000), unit="items")
    assert asked.answer.value == (5000, 15000) and asked.confidence is None
    assert labels(asked) == ["I am 80 % sure that it lies in (items)", "Commit"]
    asked.answer.value = (12_000, 13_000)
    asked.commit.click()
    for words in (
        "✓ Inside your range.",
        "You said 12,000 to 13,000 items; the truth is 12,345 items.",
        "So far: 1 of 1 of your 80 % ranges held the truth.",
    ):
        assert words in asked.result.value


def test_score_runs_over_all_predictions():
    assert teach.score() == {
        "choices": 0,
        "right": 0,
        "mean_confidence": None,
        "ranges": 0,
        "inside": 0,
    }
    for guess, sure in ((0, 50), (1, 90), (0, 100), (0, 60)):
        asked = teach.predict(f"{sure}?", 5, choices=[5, 6])
        asked.answer.value = guess
        asked.confidence.value = sure
        asked.commit.click()
    for low, high in ((0, 0.4), (0.5, 0.5), (0.6, 1)):
        asked = teach.predict(f"{low}?", 0.5, range=(0, 1))
        asked.answer.value = (low, high)
        asked.commit.click()
    assert teach.score() == {
        "choices": 4,
        "right": 3,
        "mean_confidence": 0.75,
        "ranges": 3,
        "inside": 1,
    }
    assert (
        "So far: 3 of 4 right, mean stated confidence 75 %; 1 of 3 of your 80 % ranges held the"
        " truth." in asked.result.value
    )
    # Its cell once more, and another answer: the truth is known by now
    again = teach.predict("90?", 5, choices=[5, 6])
    again.again.click()
    again.answer.value = 0
    again.commit.click()
    assert (
        "✓ Right" in again.result.value
        and teach.score()["right"] == 3
        and teach.score()["choices"] == 4
    )
    teach.reset()
    assert teach.score()["choices"] == teach.score()["ranges"] == 0


def test_unattended_runs_commit_the_default(monkeypatch):
    monkeypatch.setenv("SIDLAB_UNATTENDED", "1")
    right = teach.predict("?", lambda: "b", choices=["a", "b"], default="b")
    inside = teach.predict("?", lambda: np.float32(0.31), range=(0, 1), default=(0.3, 0.32))
    assert (
        "You said “b” (50 % sure)" in right.result.value
        and "You said 0.3 to 0.32; the truth is 0.31" in inside.result.value
    )
    first = teach.predict("First?", "b", choices=["a", "b"])
    middle = teach.predict("Middle?", 9, range=(0, 8))
    assert (
        "You said “a”" in first.result.value
        and "You said 2 to 6; the truth is 9" in middle.result.value
    )
    assert teach.score() == {
        "choices": 2,
        "right": 1,
        "mean_confidence": 0.5,
        "ranges": 2,
        "inside": 1,
    }


def test_an_error_in_the_truth_reaches_the_reader_and_is_raised(monkeypatch):
    answers = iter([ZeroDivisionError("no <data>"), "neither", "a"])

    def truth():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    asked = teach.predict("?", truth, choices=["a", "b"])
    asked.answer.value = 0
    with pytest.raises(ZeroDivisionError, match="no <data>"):
        asked.commit.click()
    assert asked.result.value == '<div role="alert"><b>ZeroDivisionError:</b> no &lt;data&gt;</div>'
    assert (
        "sidlab-inert" not in asked.commit._dom_classes
        and not asked.answer.disabled
        and not asked.committed
    )
    assert teach.score()["choices"] == 0
    with pytest.raises(
        ValueError, match=r"truth='neither' must be one of the choices \['a', 'b'\]"
    ):
        asked.commit.click()
    asked.commit.click()
    assert "✓ Right." in asked.result.value and "alert" not in asked.result.value
    monkeypatch.setenv("SIDLAB_UNATTENDED", "yes")
    with pytest.raises(ZeroDivisionError):
        teach.predict("?", lambda: 1 / 0, range=(0, 1))


def test_a_slow_truth_shows_that_it_works():
    seen = []
    asked = teach.predict(
        "?", lambda: seen.append((asked.result.value, labels(asked)[-1])) or 0.5, range=(0, 1)
    )
    asked.commit.click()
    assert seen == [('<div role="status">working …</div>', "Committed")]


def test_the_button_of_a_commit_never_loses_the_focus():
    """A disabled button drops the browser's focus: it is marked instead, and pressing it again does
    nothing.
    """
    calls = []
    asked = committed("?", lambda: calls.append(1) or "a", choices=["a", "b"], answer=0)
    assert (
        not asked.commit.disabled
        and "sidlab-inert" in asked.commit._dom_classes
        and ".sidlab-inert" in asked.children[0].value
    )
    asked.commit.click()
    assert calls == [1] and "✓ Right." in asked.result.value


def test_what_follows_comes_with_the_truth():
    table = pd.DataFrame({"a": [1.25]})
    figure = px.line(y=[1, 2], title="Drawn")
    button = teach.widgets.Button()
    follows = ["**Look** at `a`.", table, table.style.format(precision=1), figure, button]
    asked = teach.predict("?", 1, choices=[1, 2], then=follows)
    assert shown(asked) == []
    asked.commit.click()
    assert shown(asked) == [], "no answer was chosen"
    asked.answer.value = 1
    asked.commit.click()
    text, frame, styled, drawn, widget = shown(asked)
    assert text == {"text/markdown": "**Look** at `a`."}
    assert frame == {"text/html": table._repr_html_()} and ">1.2<" in styled["text/html"]
    assert drawn["application/vnd.plotly.v1+json"]["layout"]["title"]["text"] == "Drawn"
    assert widget["application/vnd.jupyter.widget-view+json"]["model_id"] == button.model_id
    asked.again.click()
    assert (
        shown(asked) == []
        and not asked.committed
        and asked.result.value == ""
        and not asked.answer.disabled
    )
    assert labels(asked)[-1] == "Commit" and "sidlab-inert" not in asked.commit._dom_classes
    asked.commit.click()
    assert asked.committed and len(shown(asked)) == 5


def test_what_follows_may_be_computed_when_it_is_needed(monkeypatch):
    calls = []
    asked = teach.predict("?", 1, choices=[1, 2], then=lambda: calls.append(1) or "text")
    assert not calls
    asked.answer.value = 0
    asked.commit.click()
    assert calls == [1] and shown(asked) == [{"text/markdown": "text"}]
    broken = teach.predict("Broken?", 1, choices=[1, 2], then=lambda: 1 / 0)
    broken.answer.value = 0
    with pytest.raises(ZeroDivisionError):
        broken.commit.click()
    assert not broken.committed and 'role="alert"' in broken.result.value and shown(broken) == []
    with pytest.raises(TypeError, match="then=3 must be Markdown, or show itself in a notebook"):
        committed("Number?", 1, choices=[1, 2], then=3, answer=0)
    monkeypatch.setenv("SIDLAB_UNATTENDED", "1")
    assert shown(teach.predict("?", 1, choices=[1, 2], then="text")) == [{"text/markdown": "text"}]
    assert labels(teach.predict("?", 1, choices=[1, 2]))[-1] == "Committed", (
        "nobody is there to answer anew"
    )


def test_a_cell_that_is_run_again_keeps_its_answer():
    committed("Which?", "b", choices=["a", "b"], answer=1)
    committed("Wide?", 3, range=(0, 8), answer=(2, 5))
    which = teach.predict("Which?", "a", choices=["a", "b"], then="so")
    wide = teach.predict("Wide?", 3, range=(0, 8))
    assert (
        which.committed
        and "✗ Wrong." in which.result.value
        and "the truth is “a”" in which.result.value
    ), "the truth of today"
    assert (
        shown(which) == [{"text/markdown": "so"}]
        and which.answer.value == 1
        and which.answer.disabled
    )
    assert wide.committed and wide.answer.value == (2, 5) and "You said 2 to 5" in wide.result.value
    assert not teach.predict("Which?", "b", choices=["a", "b", "c"]).committed, (
        "other choices make another question"
    )
    assert not teach.predict("Wide?", 3, range=(0, 9)).committed
    which.again.click()
    assert not teach.predict("Which?", "b", choices=["a", "b"]).committed
    teach.reset()
    assert not teach.predict("Wide?", 3, range=(0, 8)).committed


def test_the_stated_confidence_is_kept_with_the_answer():
    asked = teach.predict("?", "a", choices=["a", "b"])
    asked.answer.value = 0
    asked.confidence.value = 85
    asked.commit.click()
    assert "(85 % sure)" in teach.predict("?", "a", choices=["a", "b"]).result.value


def test_code_between_backticks():
    asked = committed(
        "Is `a<b` `b`?", "`x`", choices=["`x`", "y"], explain="`recall` & `k`", answer=0
    )
    assert "Is <code>a&lt;b</code> <code>b</code>?" in asked.children[0].value
    assert (
        "You said “<code>x</code>”" in asked.result.value
        and "<code>recall</code> &amp; <code>k</code>" in asked.result.value
    )
    assert asked.answer._options_labels == (
        "x",
        "y",
    ), "the label of a radio button holds text alone"
    quiz = teach.quiz(teach.Question("`a`?", ["`x`", "y"], 0, "`why`"))
    quiz.check.click()
    quiz.answers[0].value = 0
    quiz.check.click()
    assert (
        "<code>a</code>?" in quiz.children[0].value and "<code>why</code>" in quiz.feedback[0].value
    )
    assert quiz.answers[0]._options_labels == ("x", "y")


@pytest.mark.parametrize(
    ("truth", "options", "message"),
    [
        ("a", {}, "give either choices or range"),
        ("a", {"choices": ["a", "b"], "range": (0, 1)}, "give either choices or range"),
        ("a", {"choices": ["a"]}, "choices must be two or more that differ"),
        ("a", {"choices": ["a", "a"]}, "choices must be two or more that differ"),
        ("c", {"choices": ["a", "b"]}, r"truth='c' must be one of the choices \['a', 'b'\]"),
        (
            "a",
            {"choices": ["a", "b"], "default": "c"},
            r"default='c' must be one of the choices \['a', 'b'\]",
        ),
        (0, {"range": (1, 1)}, r"range=\(1, 1\) must be \(low, high\)"),
        (0, {"range": (0, math.inf)}, "must be .low, high., finite"),
        (
            0,
            {"range": (0, 1), "default": (0.5, 2)},
            r"default=\(0.5, 2\) must be \(low, high\) within range=\(0, 1\)",
        ),
        (0, {"range": (0, 1), "default": (0.8, 0.2)}, "default=.* within range"),
        (0, {"range": (0, 1), "default": 0.5}, "default=0.5 must be"),
        (math.nan, {"range": (0, 1)}, "truth=nan must be a finite number"),
    ],
)
def test_wrong_predictions_say_what_would_be_right(truth, options, message):
    with pytest.raises(ValueError, match=message):
        teach.predict("?", truth, **options)


# --- quiz and record ------------------------------------------------------------------------------


def test_quiz_checks_itself():
    quiz = teach.quiz(
        teach.Question("1 < 2?", ["<yes>", "no"], 0, "Since 1 + 1 = 2 & 1 > 0."),
        teach.Question("2 + 2", ["3", "4", "5"], 1, "It is 4."),
        teach.Question("?", ["x", "y"], 1, "Why not."),
    )
    assert [answer.description for answer in quiz.answers] == [
        "Question 1",
        "Question 2",
        "Question 3",
    ]
    assert [answer.value for answer in quiz.answers] == [None] * 3 and quiz.total.value == ""
    assert "1 &lt; 2?" in quiz.children[0].value
    quiz.answers[0].value = 0
    quiz.answers[1].value = 2
    quiz.check.click()
    assert [feedback.value for feedback in quiz.feedback] == [
        "<b>✓ Right.</b> Since 1 + 1 = 2 &amp; 1 &gt; 0.",
        "<b>✗ Not right.</b> It is 4.",
        "<b>– No answer yet.</b> ",
    ]
    assert quiz.total.value == '<div role="status"><b>1 of 3</b> right.</div>'
    quiz.answers[1].value = 1
    quiz.answers[2].value = 1
    quiz.check.click()
    assert "3 of 3" in quiz.total.value and "Why not." in quiz.feedback[2].value


def test_a_quiz_that_is_run_again_keeps_what_was_checked():
    questions = (
        teach.Question("1?", ["x", "y"], 1, "Why."),
        teach.Question("2?", ["x", "y"], 0, "So."),
    )
    quiz = teach.quiz(*questions)
    quiz.answers[0].value = 1
    assert teach.quiz(*questions).answers[0].value is None, "nothing is checked yet"
    quiz.check.click()
    again = teach.quiz(*questions)
    assert [answer.value for answer in again.answers] == [1, None] and "1 of 2" in again.total.value
    assert again.feedback[0].value == "<b>✓ Right.</b> Why."
    teach.reset()
    assert teach.quiz(*questions).answers[0].value is None


def test_quiz_is_left_alone_in_unattended_runs(monkeypatch):
    monkeypatch.setenv("SIDLAB_UNATTENDED", "1")
    quiz = teach.quiz(teach.Question("?", ["x", "y"], 1, "Why not."))
    assert quiz.answers[0].value is None and quiz.total.value == quiz.feedback[0].value == ""


@pytest.mark.parametrize(
    ("answers", "right", "message"),
    [
        (["x"], 0, "answers=.'x'. must be two or more"),
        (["x", "y"], 2, "right=2 must be an index of the 2 answers, 0 to 1"),
        (["x", "y"], -1, "right=-1 must be an index"),
        (["x", "y"], "x", "right='x' must be an index"),
    ],
)
def test_wrong_questions_say_what_would_be_right(answers, right, message):
    with pytest.raises(ValueError, match=message):
        teach.Question("?", answers, right, "")


def test_an_empty_quiz_is_an_error():
    with pytest.raises(ValueError, match="at least one Question"):
        teach.quiz()


def test_record_writes_metrics_and_checks(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    teach.check("attention_flops", lambda n, d: 4 * n * n * d)
    assert teach.record({"recall": 0.5}) is None and not list(tmp_path.iterdir())
    monkeypatch.setenv("SIDLAB_RECORD", str(path))
    assert teach.record({"recall": np.float64(0.5), "by_level": [1, 2]}) is None
    assert json.loads(path.read_text()) == {
        "metrics": {"recall": 0.5, "by_level": [1, 2]},
        "checks": [{"name": "attention_flops", "passed": True, "verdict": "exact"}],
    }
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, [1, -math.inf], torch.tensor(1.0), np.int64(3), {"x": math.nan}]
)
def test_record_takes_finite_json_only(value, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDLAB_RECORD", str(tmp_path / "record.json"))
    with pytest.raises(ValueError, match=r"metrics\['recall'\]=.* must be a finite Python number"):
        teach.record({"good": 1, "recall": value})
    assert not list(tmp_path.iterdir())
