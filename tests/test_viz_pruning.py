"""The pruning explorer: its state is what `recommend` says for the same pruning, its view shows the
state, it follows, it sends little, and the game's scores are right."""

import json
import re
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from conftest import connect
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import sync_playwright

import sidlab
from sidlab.course.demo import load
from sidlab.course.probe import Probe
from sidlab.decoding import encode_histories, score_items
from sidlab.model_building import build_model
from sidlab.pruning import PruningConfig
from sidlab.viz import PruningExplorer
from sidlab.viz.pruning import PruningView
from sidlab.viz.pruning_svg import hover, pruning_svg

LEVELS = 4  # three codes and a separator
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def world():
    catalogue = sidlab.load_catalogue("planted", n_users=30)
    encoder = sidlab.ResidualKMeans(3, (8, 8, 4), seed=0).fit(catalogue.embeddings)
    table = sidlab.SidTable(encoder.encode(catalogue.embeddings), (8, 8, 4))
    return build_model(sidlab.TrainConfig.preset("quick"), table).eval(), catalogue


@pytest.fixture(scope="module")
def demo():
    return load()


def longest(catalogue):
    """30 items and the target: as long as the model reads."""
    return [np.resize(catalogue.histories[0], 31)]


def untold(catalogue, **titles):
    """`catalogue` without its truth, as real data are; `titles` {"item7": title} replace some."""
    items = catalogue.items.copy()
    for name, title in titles.items():
        items.loc[items.index[int(name.removeprefix("item")) - 1], "title"] = title
    return sidlab.Catalogue(
        "real", items, catalogue.histories, catalogue.user_ids, embeddings=catalogue.embeddings
    )


def kept_of(explorer):
    return np.flatnonzero(explorer.content["tokens"]["kept"])


def weights(cells):
    """The square matrix that a string of `state` holds."""
    values = np.array([ord(cell) - 35 for cell in cells]) / 10_000
    return values.reshape(round(len(values) ** 0.5), -1)


@settings(max_examples=10)
@given(st.integers(1, 9), st.integers(1, 16), st.booleans())
def test_every_token_is_marked_without_colour_in_state_and_picture(world, items, sixteenths, known):
    model, catalogue = world
    history = catalogue.histories[0][: items + 1]
    explorer = PruningExplorer(
        model,
        catalogue if known else untold(catalogue),
        histories=[history],
        keep=sixteenths / 16,
        scorer="random",
    )
    state = explorer.content
    probe = Probe(model, history[:-1], catalogue.truth)
    pruned = probe.prune(PruningConfig(keep=sixteenths / 16, scorer="random"))
    tokens = state["tokens"]
    n = len(probe.tokens)
    assert tokens["kept"] == pruned.kept.int().tolist()
    assert tokens["informative"] == ((probe.truth > 0).int().tolist() if known else [])
    titles = catalogue.items.title[probe.history - 1].tolist()
    for token in range(n):
        item, level = divmod(token, LEVELS)
        kind = "separator" if level == 3 else f"level {level + 1}"
        name = f"{kind} of item {item + 1} ({titles[item]})"
        code = "·" if level == 3 else str(int(model.table.codes[probe.history[item] - 1][level]))
        place = 1 + int((pruned.importance > pruned.importance[token]).sum())
        said = hover(state, token)
        assert said.startswith(
            f"{name}: code {code}, {'kept' if pruned.kept[token] else 'pruned'}, importance "
            f"{pruned.importance[token]:.3g} (place {place} of {n})"
        )
        assert (("truly informative" in said), ("holds nothing" in said)) == (
            (probe.truth[token] > 0, probe.truth[token] == 0) if known else (False, False)
        )
    assert max(tokens["scaled"]) == 1 and np.argsort(tokens["scaled"])[-1] == int(
        pruned.importance.argmax()
    )

    # The picture: each token above the pruner, hatched and dashed if pruned; kept ones twice.
    svg = ET.fromstring(pruning_svg(state))
    boxes = [(rect.get("class"), rect.find(f"{SVG}title").text) for rect in svg.iter(f"{SVG}rect")]
    assert boxes[:n] == [
        ("kept" if kept else "pruned", hover(state, token))
        for token, kept in enumerate(tokens["kept"])
    ]
    assert boxes[n:] == [box for box in boxes[:n] if box[0] == "kept"]
    for rect in svg.iter(f"{SVG}rect"):
        assert (rect.get("stroke-dasharray") is None, rect.get("fill") == "#fff") == (
            2 * (rect.get("class") == "kept",)
        )
    dots = sum(says * (1 + kept) for says, kept in zip(tokens["informative"], tokens["kept"]))
    assert len([*svg.iter(f"{SVG}circle")]) == dots


@pytest.mark.parametrize(
    "values",
    [
        {"keep": 1 / 3},
        {"keep": 0.1, "scorer": "recent", "layer": 1, "positions": "compact", "protect": True},
        {"keep": 0.5, "scorer": "oracle", "layer": 3, "unit": "item", "positions": "none"},
        {"keep": 0.7, "scorer": "random", "layer": 4},
        {"keep": 1.0, "scorer": "norm"},
    ],
)
def test_tokens_attention_and_list_are_what_recommend_gives(world, values):
    model, catalogue = world
    explorer = PruningExplorer(model, catalogue, user=4)
    explorer.set(**values)
    history = catalogue.histories[3][:-1]
    layer = values.get("layer", 2)
    target = int(catalogue.histories[3][-1])
    names = {"layer": "after_layer", "protect": "protect_separators"}
    unpruned, _ = sidlab.recommend(model, [history], k=10)
    model.set_pruning(
        PruningConfig(**{names.get(name, name): value for name, value in values.items()})
    )
    try:
        with torch.no_grad():
            encoded = encode_histories(model, [history], catalogue.truth)
        items, _ = sidlab.recommend(model, [history], k=10, truth=catalogue.truth)
    finally:
        model.set_pruning(None)
    stay = encoded.positions[0][encoded.attention_mask[0].bool()].tolist()
    state = explorer.content
    n = len(history) * LEVELS
    assert kept_of(explorer).tolist() == stay
    assert len(state["attention"]["before"]) == n * n and len(state["attention"]["after"]) == (
        len(stay) ** 2 if layer < 4 else 0
    )
    assert state["list"]["after"] == items[0].tolist()
    assert state["list"]["title"] == catalogue.items.title[items[0].numpy() - 1].tolist()

    # Where each one was before.
    before = unpruned[0].tolist()
    after = items[0].tolist()
    for place, (item, moved) in enumerate(zip(after, state["list"]["moved"])):
        up = before.index(item) - place if item in before else None
        assert moved == (
            "new" if up is None else "=" if up == 0 else f"▲ {up}" if up > 0 else f"▼ {-up}"
        )
    assert (
        state["list"]["out"]
        == catalogue.items.title[[item - 1 for item in before if item not in after]].tolist()
    )
    places = [found.index(target) + 1 if target in found else 0 for found in (before, after)]
    assert [state["target"][key] for key in ("item", "before", "after")] == [target, *places]
    was, now = (f"place {place}" if place else "not in the list" for place in places)
    title = catalogue.items.title[target - 1]
    assert state["label"].startswith(f"{len(stay)} of {n} tokens kept.")
    assert state["label"].endswith(f"The next item was ★ {title}: {now} (unpruned: {was}).")
    assert f"<b>{len(stay)} of {n} tokens kept.</b>" in explorer.text


def test_attention_is_the_mean_over_heads_of_all_tokens_and_of_the_kept_ones(world):
    model, catalogue = world
    explorer = PruningExplorer(model, catalogue, user=2, keep=0.5, layer=1)
    probe = Probe(model, catalogue.histories[1][:-1])
    pruned = probe.prune(PruningConfig(after_layer=1, keep=0.5))
    for name, attention in (("before", probe.attention[0]), ("after", pruned.attention[0])):
        assert (
            np.abs(weights(explorer.content["attention"][name]) - attention.mean(0).numpy()).max()
            <= 0.5e-4 + 1e-6
        )


def test_following_equals_fresh(world):
    model, catalogue = world
    follower = PruningExplorer(model, catalogue)
    for values in (
        {"keep": 0.6},
        {"user": 7, "scorer": "recent"},
        {"layer": 4},
        {"user": 2, "unit": "item", "keep": 0.2, "layer": 1},
    ):
        for name, value in values.items():
            follower.controls[name].value = value
        fresh = PruningExplorer(
            model, catalogue, **{name: control.value for name, control in follower.controls.items()}
        )
        assert {"alert": ""} | follower.content == {"alert": ""} | fresh.content


def test_the_start_and_a_move_are_small(world):
    model, catalogue = world
    for histories, limit in ((None, 20), (longest(catalogue), 30)):
        explorer = PruningExplorer(model, catalogue, histories=histories)
        assert (
            len(json.dumps(explorer.content, ensure_ascii=False).encode())
            + len(PruningView._esm.encode())
            <= 100 * 1024
        )
        sent = connect(explorer)
        for name, value in (
            ("keep", 0.9),
            ("keep", 0.31),
            ("keep", 1.0),
            ("keep", 0.05),
            ("scorer", "recent"),
            ("unit", "item"),
            ("positions", "none"),
        ):
            sent.clear()
            explorer.controls[name].value = value
            assert len(sent) == 2, "one for the control, one for the state"
            assert sum(sent) <= limit * 1024


def test_own_scorers_join_the_menu_and_their_errors_are_shown_and_raised(world):
    model, catalogue = world

    def oldest(signals):
        return -signals.positions.float()

    def never(signals):
        return torch.where(signals.levels == 0, -torch.inf, signals.positions.float())

    def broken(signals):
        raise RuntimeError("no <idea>")

    explorer = PruningExplorer(
        model,
        catalogue,
        scorers={"mine": oldest, "never": never, "broken": broken},
        scorer="mine",
        keep=0.25,
    )
    n = len(catalogue.histories[0]) - 1
    assert kept_of(explorer).tolist() == [*range(n)]
    explorer.controls["scorer"].value = "never"
    json.dumps(explorer.content, allow_nan=False)
    assert all(
        0 <= share <= 1 for share in explorer.content["tokens"]["scaled"]
    ) and "importance -inf" in hover(explorer.content, 0)
    with pytest.raises(RuntimeError, match="no <idea>"):
        explorer.controls["scorer"].value = "broken"
    assert 'role="alert"' in explorer.alert and "no &lt;idea&gt;" in explorer.alert
    explorer.controls["scorer"].value = "recent"
    assert explorer.alert == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scorer": "rasp"}, "scorer='rasp' is unknown; use one of 'rastp'"),
        ({"unit": "items"}, "unit='items' is unknown"),
        ({"user": 60}, r"user must lie in 1..30, got 60"),
        ({"keep": 33}, "keep must lie in 0.05..1, got 33"),
        ({"layer": 9}, "layer must lie in 1..4"),
        ({"histories": [[1, 2], [3, 999]]}, r"item ids in 1..\d+, got \[3, 999\]"),
    ],
)
def test_what_the_controls_do_not_have_is_refused(world, arguments, message):
    with pytest.raises(ValueError, match=message):
        PruningExplorer(*world, **arguments)


def test_models_and_histories_that_do_not_fit_are_refused_or_left_out(world):
    model, catalogue = world
    with pytest.raises(ValueError, match="with a table of the catalogue's"):
        PruningExplorer(model, sidlab.load_catalogue("planted", kinds=24, n_users=5))
    qwen = build_model(sidlab.TrainConfig.preset("smoke", arch="qwen"), model.table)
    with pytest.raises(ValueError, match="got a SidQwen with"):
        PruningExplorer(qwen, catalogue)
    explorer = PruningExplorer(model, catalogue, histories=[[3], catalogue.histories[0], [5]])
    assert len(explorer.histories) == 1 and explorer.controls["user"].max == 1


def test_real_data_has_no_dots_and_no_oracle(world):
    model, catalogue = world
    explorer = PruningExplorer(model, untold(catalogue))
    assert "oracle" not in explorer.controls["scorer"].options
    assert (
        explorer.content["tokens"]["informative"] == []
        and "informative" not in explorer.content["label"]
    )
    explorer.acted({"pruned": [0]})
    assert [row[0] for row in explorer.content["hand"]["rows"]] == [
        "you",
        "rastp",
        "random",
        "recent",
    ]
    with pytest.raises(ValueError, match="model and catalogue, or neither"):
        PruningExplorer(model)


def test_simple_shows_three_controls_and_has_them_all(world):
    explorer = PruningExplorer(*world, simple=True, layer=3)
    assert [control.description for control in explorer.children[0].children] == [
        "kept share",
        "scorer",
        "user",
    ]
    assert explorer.content["layer"] == 3 and len(explorer.controls) == 7
    whole = PruningExplorer(*world)
    more = whole.children[0].children[-1]
    experts = whole.children[1]
    assert experts.layout.display == "none"
    more.value = True
    assert experts.layout.display is None and {
        *experts.children,
        *whole.children[0].children[:3],
    } == {*whole.controls.values()}


def only(tokens):
    """A scorer that keeps these."""

    def scorer(signals):
        return torch.isin(signals.positions, torch.tensor(tokens)).float()

    return scorer


def test_by_hand_is_scored_as_recommend_and_exact_scoring_do(demo):
    model = demo.model
    catalogue = demo.catalogue
    explorer = PruningExplorer(model, catalogue, user=40, keep=0.5, layer=2)
    *history, target = catalogue.histories[39].tolist()
    n = len(history) * LEVELS
    out = [0, 1, 2, 3, *range(8, 30), 41]
    explorer.acted({"hand": True})
    assert explorer.content["hand"] == {
        "on": True,
        "pruned": [],
        "rows": [],
        "text": "",
        "verdict": "",
    }
    assert explorer.content["tokens"]["kept"] == [1] * n
    explorer.acted({"pruned": out})
    hand = explorer.content["hand"]
    kept = [token for token in range(n) if token not in out]
    assert kept_of(explorer).tolist() == kept and hand["pruned"] == out
    assert [row[0] for row in hand["rows"]] == ["you", "rastp", "random", "recent", "oracle"]
    found = {}
    try:
        for name, scorer in (
            ("you", only(kept)),
            *((name, name) for name in ("rastp", "random", "recent", "oracle")),
        ):
            model.set_pruning(PruningConfig(keep=len(kept) / n, scorer=scorer))
            items = sidlab.recommend(model, [history], truth=catalogue.truth)[0][0].tolist()
            score = float(score_items(model, [history], truth=catalogue.truth)[0, target - 1])
            found[name] = (str(items.index(target) + 1) if target in items else "–", score)
            if name == "you":
                assert explorer.content["list"]["after"] == items
    finally:
        model.set_pruning(None)
    for name, place, score in hand["rows"]:
        assert place == found[name][0] and float(score) == pytest.approx(found[name][1], abs=0.006)
    better = [name for name in found if found["you"][1] - found[name][1] > 5e-3]
    level = [
        name for name in found if name != "you" and abs(found["you"][1] - found[name][1]) < 5e-3
    ]
    verdict = f"Better than {', '.join(better)}." if better else "Better than none so far."
    assert hand["verdict"] == verdict + (f" Level with {', '.join(level)}." if level else "")
    resting = [name for name, control in explorer.controls.items() if control.disabled]
    assert resting == ["keep", "scorer", "unit", "protect"], "by hand the scorer has no say"
    assert all(f"{name} {place} ({score})" in hand["text"] for name, place, score in hand["rows"])

    # Another user begins anew, and the scorer is back when the hand rests.
    explorer.controls["user"].value = 3
    assert explorer.content["hand"]["pruned"] == [] and min(explorer.content["tokens"]["kept"]) == 1
    explorer.acted({"hand": False})
    fresh = PruningExplorer(model, catalogue, user=3, keep=0.5)
    assert {"alert": ""} | explorer.content == {"alert": ""} | fresh.content


def test_a_rule_is_scored_as_each_user_alone(demo):
    model = demo.model
    catalogue = demo.catalogue
    histories = [catalogue.histories[0][:2], *catalogue.histories[1:25]]
    explorer = PruningExplorer(model, catalogue, histories=histories)
    explorer.acted({"rule": {"levels": [1, 2], "newest": 3}})
    rule = explorer.content["rule"]
    hits = {}
    kept = 0
    total = 0
    for *history, target in (history.tolist() for history in histories):
        probe = Probe(model, history)
        n = len(probe.tokens)
        stay = [
            token
            for token in range(n)
            if token % LEVELS in (1, 2) and token // LEVELS >= len(history) - 3
        ]
        kept = kept + len(stay)
        total = total + n
        lists = {
            "your rule": probe.prune(
                PruningConfig(keep=1.0), without=[token for token in range(n) if token not in stay]
            )
        }
        assert np.flatnonzero(lists["your rule"].kept).tolist() == stay
        lists |= {
            name: probe.prune(PruningConfig(keep=len(stay) / n, scorer=name))
            for name in ("rastp", "random", "recent")
        }
        lists["nothing pruned"] = probe.prune(None)
        for name, pruned in lists.items():
            hits.setdefault(name, []).append(target in pruned.items.tolist())
    assert rule["rows"] == [[name, f"{np.mean(found):.3f}"] for name, found in hits.items()]
    assert (rule["share"], rule["users"], rule["number"]) == (
        f"{kept / total:.0%}",
        25,
        1,
    ) and model.pruning is None
    assert (
        "keep level 2, level 3 of the newest 3 items" in rule["text"]
        and f"your rule {rule['rows'][0][1]}" in rule["text"]
    )
    explorer.acted({"rule": {"levels": [1, 2], "newest": 3}})
    assert explorer.content["rule"]["number"] == 2, (
        "so that the view sees an answer, though it be the same"
    )


@pytest.mark.parametrize(
    "said, message",
    [
        ({"pruned": [44]}, "places below 44"),
        ({"pruned": [*range(44)]}, "leave one token"),
        ({"pruned": [-1]}, "pruned must be at least 0"),
        ({"rule": {"levels": [], "newest": 3}}, r"at least one of 0..3, got \[\]"),
        ({"rule": {"levels": [4], "newest": 3}}, "levels must hold"),
        ({"rule": {"levels": [0], "newest": 0}}, "newest must be at least 1"),
    ],
)
def test_what_cannot_be_played_is_refused(demo, said, message):
    explorer = PruningExplorer(demo.model, demo.catalogue, user=40)
    before = explorer.content
    with pytest.raises(ValueError, match=message):
        explorer.acted(said)
    explorer.refresh()
    assert {"alert": ""} | before == explorer.content


def test_the_picture_is_xml_whatever_a_title_holds(world):
    model, catalogue = world
    target = int(catalogue.histories[0][-1])
    titles = {
        f"item{catalogue.histories[0][0]}": "W" * 400,
        f"item{catalogue.histories[0][1]}": 'a<b & "c"\x00\x1b]]>',
        f"item{target}": "<" * 90,
    }
    explorer = PruningExplorer(model, untold(catalogue, **titles), keep=0.4)
    picture = explorer.picture()
    svg = ET.fromstring(picture["image/svg+xml"])
    n = (len(catalogue.histories[0]) - 1) * LEVELS
    assert (
        len([*svg.iter(f"{SVG}rect")]) == n + len(kept_of(explorer))
        and picture["text/plain"] == explorer.content["label"]
    )
    assert max(len(text.text) for text in svg.iter(f"{SVG}text")) < 200


def test_export_has_a_frame_for_each_value_and_no_game(world, tmp_path):
    model, catalogue = world
    explorer = PruningExplorer(model, catalogue, keep=1 / 3)
    frames = explorer.frames()
    values = [value for value, _ in frames]
    assert values[0] == "5%" and values[-1] == "100%" and "33%" in values and len(values) == 22
    kept = [sum(state["tokens"]["kept"]) for _, state in frames]
    assert kept == sorted(kept) and kept[-1] == 4 * (len(catalogue.histories[0]) - 1)
    assert not any(state["game"] for _, state in frames) and explorer.content["game"]
    page = explorer.export(tmp_path / "x.html").read_text()
    assert (
        f'value="{values.index("33%")}"' in page
        and "plotly" not in re.sub(r"env\.plotly.*", "", page).lower()
    )


@pytest.fixture(scope="module")
def page():
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        wrong = []
        page.on(
            "console",
            lambda message: wrong.append(message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        yield page
        browser.close()
        assert not wrong


def show(page, state, **env):
    """Draw `state` on the page; what the view says is kept in `said`."""
    page.evaluate(
        """([state, env]) => draw(document.getElementById("v"), state,
                                  {act: content => said.push(content), ...env})""",
        [state, {"dark": False, "reduced": True} | env],
    )


def settled(page):
    """Wait until nothing moves any more: what is measured before is a moment of a transition."""
    # Two frames first: a fold draws what it holds once it has told that it is open.
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.wait_for_function(
        "document.getAnimations().length === 0 && !document.querySelector('.leaving')"
    )


def opened(page, width):
    page.set_viewport_size({"width": width, "height": 700})
    page.set_content('<body style="margin: 0"><div id="v"></div></body>')
    page.add_script_tag(content=PruningView.script() + "\nvar said = [];")


@pytest.mark.parametrize("width, height", [(950, 510), (660, 560), (480, 800)])
def test_the_view_fits_whatever_a_title_holds(world, page, width, height):
    model, catalogue = world
    histories = longest(catalogue)
    plain = PruningExplorer(model, catalogue, histories=histories, keep=0.4).content
    titles = {
        f"item{item}": "W" * 400
        for item in (*histories[0][:3], histories[0][-1], *plain["list"]["after"][:2])
    }
    for state in (
        plain,
        PruningExplorer(model, untold(catalogue, **titles), histories=histories, keep=0.4).content,
    ):
        opened(page, width)
        show(page, state)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".sidlab-pruning").bounding_box()["height"] <= height
        tall = page.locator(".title").evaluate_all(
            "titles => Math.max(...titles.map(title => title.offsetHeight))"
        )
        assert tall <= 27, "two lines of a title, not more"


def test_the_view_shows_what_the_state_says_and_follows(demo, page):
    explorer = PruningExplorer(demo.model, demo.catalogue, user=40, keep=1.0)
    opened(page, 950)
    for number, keep in enumerate((1.0, 0.5, 0.15, 0.6)):
        explorer.set(keep=keep)
        state = explorer.content
        show(page, state, reduced=number % 2 == 0)
        settled(page)
        said = page.locator(".strip:not(.after) [data-token]").evaluate_all(
            "all => all.map(t => [t.dataset.kept, t.title, t.ariaLabel])"
        )
        words = [hover(state, token) for token in range(44)]
        assert said == [
            ["true" if kept else "false", *[words[token]] * 2]
            for token, kept in enumerate(state["tokens"]["kept"])
        ]
        after = page.locator(".after [data-token]").evaluate_all(
            "all => all.map(t => Number(t.dataset.token))"
        )
        assert after == kept_of(explorer).tolist()
        rows = page.locator("[data-item]").evaluate_all(
            "all => all.map(r => [r.dataset.place, r.dataset.item, r.children[2].innerText])"
        )
        assert rows == [
            [str(place), str(item), moved]
            for place, (item, moved) in enumerate(
                zip(state["list"]["after"], state["list"]["moved"]), start=1
            )
        ]
        assert page.locator(".missing").count() == (state["target"]["after"] == 0)
        assert page.locator(".sidlab-said").inner_text().split() == state["label"].split()

    # The larger maps say who looks at whom; they stay open, and shrink with the tokens.
    page.get_by_text("attention maps").click()
    canvas = page.locator("canvas[tabindex]").last
    canvas.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    kept = kept_of(explorer)
    name = explorer.content["tokens"]["name"]
    value = weights(explorer.content["attention"]["after"])[1, 1]
    assert canvas.get_attribute("title").startswith(f"{name[kept[1]]} looks at {name[kept[1]]}: ")
    assert float(canvas.get_attribute("title").rpartition(": ")[2]) == pytest.approx(
        value, rel=0.06
    )
    settled(page)
    sides = [
        box["width"] - 2
        for box in (page.locator("canvas[tabindex]").nth(i).bounding_box() for i in (0, 1))
    ]
    assert sides[1] / sides[0] == pytest.approx(len(kept) / 44, abs=0.01)
    explorer.set(keep=0.2)
    show(page, explorer.content)
    assert page.locator("details").first.evaluate("details => details.open")


def test_the_game_by_mouse_and_by_keyboard(demo, page):
    explorer = PruningExplorer(demo.model, demo.catalogue, user=40, keep=1.0)

    def heard():
        """Let Python hear what the view has said since, and the view see the answer."""
        for content in page.evaluate("said.splice(0)"):
            explorer.acted(content)
        show(page, explorer.content)

    opened(page, 950)
    show(page, explorer.content)
    page.locator("[data-token='3']").first.click()
    assert page.evaluate("said") == [], "a click prunes nothing yet"
    page.get_by_role("button", name="prune by hand").click()
    heard()
    tokens = page.locator(".strip:not(.after) [data-token]")
    tokens.nth(3).click()
    tokens.nth(7).click()  # before there is an answer
    heard()
    assert (
        explorer.content["hand"]["pruned"] == [3, 7]
        and tokens.nth(3).get_attribute("data-kept") == "false"
    )
    tokens.nth(0).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "Enter", "ArrowRight", " "):
        page.keyboard.press(key)
    heard()
    assert explorer.content["hand"]["pruned"] == [4, 7], "the third is back, the fourth is out"
    table = page.locator(".right table").inner_text()
    assert all(cell in table for row in explorer.content["hand"]["rows"] for cell in row)
    page.get_by_role("button", name="keep all").click()
    heard()
    assert explorer.content["hand"]["pruned"] == []

    page.get_by_text("a rule of your own").click()
    page.get_by_label("level 1", exact=True).uncheck()
    page.get_by_label("level 3", exact=True).check()
    page.get_by_label("of the newest").fill("2")
    page.get_by_role("button", name="score it").click()
    assert "working" in page.locator("details[open]").inner_text()
    assert page.evaluate("said") == [{"rule": {"levels": [1, 2], "newest": 2}}]
    explorer._crowd = explorer._crowd[:10]
    heard()
    shown = page.locator("details[open]").inner_text()
    assert "working" not in shown and all(
        cell in shown for row in explorer.content["rule"]["rows"] for cell in row
    )
