"""Table, picture and page say what the front says, for every kind of front, and let no text do harm."""

import base64
import hashlib
import html.parser
import io
import json
import math
import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from moalign import storage
from moalign.errors import CorruptFileError, RunError
from moalign.report import labels, picture, wording
from moalign.report.curves import curves
from moalign.report.page import write_page
from moalign.report.source import check_front, read_source
from moalign.report.table import show_front
from moalign.sweeps import journal

HOSTILE = '<script>alert("x")</script>\x1b[31m"\'&$\\alpha$ [red]{{ 7 * 7 }}\u202e'


def point(index, names, scores, dominated=False, **changes):
    preference = {"kind": "weights", "values": dict.fromkeys(names, 1 / len(names)), "name": None}
    return {
        "id": f"c{index}",
        "preference": preference,
        "scores": dict(zip(names, scores, strict=True)),
        "stderr": dict.fromkeys(names, 0.012),
        "kl": 1.25,
        "dominated": dominated,
        "kind": "trained",
        "tokens": 1000,
        "details": {"well_formed": 0.987},
    } | changes


def front(objectives=2, points=5, base=True, failed=0, exact=False):
    names = ["helpful", "harmless", "concise", "kind", "true"][:objectives]
    angles = np.linspace(0.1, 1.4, max(points, 1))
    trained = [
        point(
            i,
            names,
            [round(float(math.cos(angle) if j % 2 else math.sin(angle)) + j / 10, 6) for j in range(objectives)],
        )
        for i, angle in enumerate(angles[:points])
    ]
    result = {
        "objectives": [{"name": name, "direction": "min" if name == "concise" else "max"} for name in names],
        "evaluation": "mean reward on held-out prompts",
        "reference_point": dict.fromkeys(names, -0.1),
        "hypervolume": 0.75,
        "base": {"scores": dict.fromkeys(names, 0.05), "stderr": dict.fromkeys(names, 0.01)} if base else None,
        "points": trained,
        "failed": [{"id": f"f{i}", "error": "the loss was not finite at step 3"} for i in range(failed)],
    }
    if exact:
        result |= {
            "front_share": 0.831,
            "front_share_worst": -0.02,
            "hypervolume_share": 0.7,
            "ceiling": {"front_share": 0.97},
            "exact_front": [
                {
                    "weights": dict.fromkeys(names, 0.5),
                    "scores": dict(zip(names, (1.2 * math.sin(a), 1.2 * math.cos(a)), strict=True)),
                }
                for a in angles
            ],
        }
    return result


def printed(value, width=160) -> str:
    text = io.StringIO()
    show_front(value, Console(file=text, width=width, color_system=None))
    return text.getvalue()


def pixels(path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


KINDS = {
    "two": front(),
    "one point": front(points=1),
    "one point, no base": front(points=1, base=False),
    "nothing finished": front(points=0, failed=2),
    "nothing at all": front(points=0, base=False),
    "failures": front(failed=3),
    "known world": front(exact=True),
    "three": front(3),
    "five": front(5, 30),
    "three, one point, no base": front(3, 1, base=False),
    "three, none": front(3, 0, failed=1),
    "one objective": front(1, 4),
    "one objective, none": front(1, 0, base=False),
    "many": front(2, 60),
    "the same point thrice": front(2, 0)
    | {"points": [point(i, ["helpful", "harmless"], [0.5, 0.5]) for i in range(3)]},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_front_is_printed_drawn_and_written(tmp_path, name):
    value = KINDS[name]
    storage.write_json(tmp_path / "front.json", value)
    text = printed(value)
    for entry in (*value["points"], *value["failed"]):
        assert entry["id"] in text
    page = write_page(tmp_path).read_text()
    image = pixels(tmp_path / "front.png")
    assert image.shape[0] > 300 and image.shape[1] > 600 and image.std() > 0.01
    assert base64.b64encode((tmp_path / "front.png").read_bytes()).decode() in page
    for entry in (*value["points"], *value["failed"]):
        assert f">{entry['id']}<" in page


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_shows_scores_errors_and_standing():
    value = front(2, 2, failed=1, exact=True)
    value["points"][1] |= {"dominated": True, "kl": None}
    text = printed(value)
    row, beaten = (
        next(line for line in text.splitlines() if line.strip().startswith(name)) for name in ("● c0", "○ c1")
    )
    assert "0.50 / 0.50" in row and "0.100 ± 0.012" in row and "1.25" in row and "0.987" in row
    assert " \N{EN DASH} " in beaten
    assert "0.75, measured from helpful \N{MINUS SIGN}0.1, harmless \N{MINUS SIGN}0.1" in text
    assert "83.1 % (this model's ceiling: 97.0 %)" in text and "\N{MINUS SIGN}2.0 %" in text
    assert "f0: the loss was not finite at step 3" in text
    assert "2, 1 of them on the front; 1 failed" in text
    assert "0.100 ± 0.012" in printed(value, width=80), "an ordinary terminal is wide enough"


def test_details_that_are_not_shown_are_named_and_negated_scores_are_told():
    assert "concise (negated)" in printed(front(3))
    value = front(2, 1)
    value["points"][0]["details"] = {f"detail{i}": float(i) for i in range(7)}
    assert "detail4, detail5, detail6" in printed(value)


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.71234, 0.0131, "0.712 ± 0.013"),
        (-12.3456, 1.7, "\N{MINUS SIGN}12.3 ± 1.7"),
        (1234.5, 25.0, "1234 ± 25"),
        (0.5, 0.0, "0.500 ± 0.000"),
        (0.51234, None, "0.5123"),
        (-0.5, None, "\N{MINUS SIGN}0.5"),
        (0.1, 1e-12, "0.100000 ± 1e-12"),
        (-0.001, 0.25, "0.00 ± 0.25"),
    ],
)
def test_measures(value, stderr, text):
    assert wording.measure(value, stderr) == text


def test_nothing_is_not_less_than_nothing():
    assert wording.percent(-0.0001) == "0.0 %" and wording.percent(-0.001) == "\N{MINUS SIGN}0.1 %"


def test_preferences_in_words():
    names = ["helpful", "harmless"]
    weights = {"kind": "weights", "values": {"harmless": 0.3, "helpful": 0.7}, "name": None}
    assert wording.preference_text(weights, names) == "0.70 / 0.30"
    assert wording.preference_text(weights | {"name": "mine"}, names) == "mine (0.70 / 0.30)"
    direction = {"kind": "direction", "values": {"helpful": 0.8, "harmless": -0.6}, "name": None}
    assert wording.preference_text(direction, names) == "→ 0.80 / \N{MINUS SIGN}0.60"
    assert wording.preference_text({"kind": "thresholds", "values": {"harmless": 0.8}}, names) == "harmless ≥ 0.8"


# --- the picture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["known world", "three", "one objective"])
def test_equal_fronts_give_equal_bytes_without_a_time(tmp_path, name):
    picture.draw(KINDS[name], tmp_path / "a.png")
    picture.draw(json.loads(json.dumps(KINDS[name])), tmp_path / "b.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    kinds, position = [], 8
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kinds.append(data[position + 4 : position + 8])
        position += length + 12
    assert set(kinds) <= {b"IHDR", b"pHYs", b"IDAT", b"IEND"}


def test_the_picture_does_not_depend_on_the_users_style(tmp_path):
    import matplotlib

    picture.draw(KINDS["two"], tmp_path / "a.png")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "lines.linewidth": 9}):
        picture.draw(KINDS["two"], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_far_reference_point_does_not_squeeze_the_points(tmp_path):
    picture.draw(front(), tmp_path / "near.png")
    far = front() | {"reference_point": {"helpful": -1e6, "harmless": -1e6}}
    picture.draw(far, tmp_path / "far.png")
    colour = np.array([0x4F, 0x46, 0xE5]) / 255
    # The marks of the points are where they were: only the shaded area differs.
    marks = [np.abs(pixels(tmp_path / name)[..., :3] - colour).sum(-1) < 0.02 for name in ("near.png", "far.png")]
    assert marks[0].sum() > 500 and np.array_equal(*marks)


def test_names_in_mathematical_notation_are_not_parsed(tmp_path):
    value = json.loads(json.dumps(front()).replace('"helpful"', '"$\\\\frac{"'))
    picture.draw(value, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


boxes = st.tuples(st.floats(0, 400), st.floats(0, 300))


@settings(deadline=None)
@given(st.lists(boxes, min_size=1, max_size=25))
def test_labels_never_overlap_each_other_a_mark_or_the_frame(anchors):
    frame = labels.Box(0, 0, 400, 300)
    marks = [labels.Box(x - 5, y - 5, x + 5, y + 5) for x, y in anchors]
    centres = labels.place(anchors, [(60, 14)] * len(anchors), frame, marks)
    placed = [labels.Box(x - 30, y - 7, x + 30, y + 7) for x, y in (c for c in centres if c is not None)]
    assert all(box.inside(frame) for box in placed)
    assert not any(a.overlaps(b) for i, a in enumerate(placed) for b in [*placed[:i], *marks])
    assert len(anchors) > 3 or placed, "a few points always leave room somewhere"


def test_labels_find_room_where_there_is_some():
    centres = labels.place([(200, 150), (200, 150)], [(60, 14)] * 2, labels.Box(0, 0, 400, 300), [])
    assert None not in centres and centres[0] != centres[1]
    assert labels.place([(5, 5)], [(60, 14)], labels.Box(0, 0, 50, 50), []) == [None]


# --- the page -------------------------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """All tags with their attributes, and the text, of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    """A run directory with everything in it."""
    folder = tmp_path / "my run"
    storage.write_json(folder / "front.json", front(2, 3, failed=1, exact=True))
    storage.write_json(
        folder / "run.json", {"config": {"train": {"lr": 2e-4}}, "libraries": {"torch": "9.8.7"}, "x": None}
    )
    journal.append(folder / "journal.jsonl", {"event": "base", "scores": {"helpful": 0.1}})
    lines = [
        {"step": i, "loss": 0.7 - i / 100, "nan": "nan" if i == 3 else i, "ok": True, "text": "x"} for i in range(9)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo'
    storage.write_text(folder / "candidates" / "c0" / "metrics.jsonl", text)
    return folder


def test_the_page_holds_the_whole_run_and_needs_nothing_else(run):
    page = write_page(run)
    tags = Tags(page.read_text())
    assert page == run / "report.html"
    for text in ("my run", "lr: 0.0002", "torch: 9.8.7", '"event": "base"', "0.7 → 0.62", "1 not finite", "9 steps"):
        assert text in tags.text, text
    assert "c0: 1 unreadable lines in metrics.jsonl" in tags.text
    assert sum(tag == "polyline" for tag, _ in tags.tags) == 3, "loss, and both sides of the gap"
    for tag, attributes in tags.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base")
        assert not any(name.startswith("on") or name in ("style", "href") for name in attributes)
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/png;base64,")


def test_the_content_policy_allows_our_style_and_nothing_that_runs(run):
    text = write_page(run).read_text()
    policy = next(a["content"] for tag, a in Tags(text).tags if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["style-src"] == f"'sha256-{digest}'" and "script-src" not in rules


def test_the_same_files_give_the_same_page(run):
    first = write_page(run).read_bytes()
    assert write_page(run).read_bytes() == first


def test_hostile_text_stays_text(run):
    value = front(2, 2, failed=1)
    hostile = json.loads(json.dumps(value).replace('"helpful"', json.dumps(HOSTILE)))
    hostile["points"][0] |= {"id": HOSTILE, "kind": HOSTILE, "details": {HOSTILE: 1.0}}
    hostile["points"][0]["preference"]["name"] = HOSTILE
    hostile["failed"] = [{"id": "../../../etc/passwd", "error": HOSTILE}]
    hostile["evaluation"] = HOSTILE
    storage.write_json(run / "front.json", hostile)
    storage.write_json(run / "run.json", {HOSTILE: HOSTILE, "config": {HOSTILE: [HOSTILE]}})
    journal.append(run / "journal.jsonl", {"event": HOSTILE})
    storage.write_text(run / "candidates" / "c1" / "metrics.jsonl", json.dumps({HOSTILE: 1.0}))
    text = write_page(run).read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "{{ 7 * 7 }}" in Tags(text).text, "the text was not taken for a template"
    for letter in ("\x1b", "\u202e"):
        assert letter not in text
        assert letter not in printed(hostile)
    assert "[red]" in printed(hostile), "no markup of the terminal either"
    assert "root:" not in text


def test_damage_beside_the_front_is_told_on_the_page(run):
    data = (run / "journal.jsonl").read_bytes()
    (run / "journal.jsonl").write_bytes(b"x" + data + data)
    (run / "run.json").write_text("[1]")
    (run / "candidates" / "c0" / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    text = Tags(write_page(run).read_text()).text
    assert "The history is not shown." in text and "journal.jsonl:1" in text
    assert "The configuration is not shown." in text
    assert "1 unreadable lines" in text


def test_metrics_are_not_read_through_links(run):
    secret = run.parent / "secret.jsonl"
    secret.write_text('{"secret": 1}')
    file = run / "candidates" / "c1" / "metrics.jsonl"
    file.parent.mkdir()
    file.symlink_to(secret)
    assert read_source(run).metrics["c1"].rows == ()


def test_without_a_front_there_is_no_report(tmp_path):
    with pytest.raises(RunError, match=r"no front\.json.*moalign resume"):
        write_page(tmp_path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"hypervolume": math.nan}, "hypervolume"),
        ({"reference_point": {"helpful": 0.0}}, "reference_point"),
        ({"objectives": []}, "objectives"),
        ({"objectives": [{"name": "helpful", "direction": "up"}]}, r"objectives\.0\.direction"),
        ({"base": {"scores": {}, "stderr": {}}}, "one score per objective"),
        ({"points": [point(0, ["helpful"], [1.0])]}, "one score per objective"),
        ({"points": [point(0, ["helpful", "harmless"], [1.0, math.inf])]}, r"points\.0\.scores\.harmless"),
        ({"points": [point(0, ["helpful", "harmless"], [1.0, 1.0], id=7)]}, r"points\.0\.id"),
    ],
)
def test_a_front_of_another_form_is_refused_by_key(tmp_path, change, key):
    with pytest.raises(CorruptFileError, match=key):
        check_front(front() | change)
    with pytest.raises(CorruptFileError, match=key):
        picture.draw(front() | change, tmp_path / "front.png")
    assert not (tmp_path / "front.png").exists()


# --- curves ---------------------------------------------------------------------------------------------------------


def test_a_curve_spans_its_box():
    (curve,) = curves([{"step": 10, "loss": 3.0}, {"step": 20, "loss": 1.0}, {"step": 30, "loss": 2.0}])
    assert curve.lines == ("0.00,0.00 50.00,30.00 100.00,15.00",)
    assert (curve.first, curve.last, curve.lowest, curve.highest, curve.missing) == (3.0, 2.0, 1.0, 3.0, 0)


def test_long_curves_are_thinned_and_flat_or_single_ones_drawn():
    (curve,) = curves([{"step": i, "loss": float(i % 7)} for i in range(10_000)])
    assert 100 <= len(curve.lines[0].split()) <= 200
    assert curves([{"loss": 1.0}])[0].lines == ("50.00,15.00 50.00,15.00",)
    assert curves([{"loss": 1.0}, {"loss": 1.0}])[0].lines == ("0.00,15.00 100.00,15.00",)
    assert curves([]) == [] and curves([{"step": 1, "flag": True, "text": "x", "none": None}]) == []


def test_a_metric_that_some_rows_lack_is_no_gap():
    (curve,) = curves([{"loss": 1.0}, {}, {"loss": 2.0}])
    assert len(curve.lines) == 1 and curve.missing == 0
