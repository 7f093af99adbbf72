"""The page in a browser, from disk, with the network off: every view and every control, as people use them."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from small import small_checkpoint, small_model
from test_engine import draw, drawn

import export
import sample
from checkpoint import load_checkpoint, load_model, save_checkpoint
from data import LINEAR, histogram_code
from diffusion import DiffusionProcess
from evaluation.classifier import load_feature_network
from evaluation.features import extract_features
from runtime import checkpoints
from web.page import page_model

PHONE = dict(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True, device_scale_factor=2)
LEVELS = """canvas => {
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
    copy.drawImage(canvas, 0, 0);
    return [...copy.getImageData(0, 0, canvas.width, canvas.height).data].filter((_, i) => i % 4 === 0);
}"""
TABS = ("make", "sketch", "compare", "inside")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint with ten classes."""
    return small_checkpoint(tmp_path_factory.mktemp("model") / "model.pt", conditional=True)


@pytest.fixture(scope="module")
def exported(checkpoint):
    """The page that export.py writes of it, in float32."""
    path = checkpoint.with_name("page.html")
    assert export.main(["--checkpoint", str(checkpoint), "--output", str(path), "--weights", "float32"]) == 0
    return path


def levels(opened, canvas):
    """What a canvas shows, as (N,) levels of its red channel."""
    return np.array(opened.page.eval_on_selector(f"#{canvas}", LEVELS))


def click(opened, selector):
    opened.page.click(selector)


def choose(opened, fieldset, name):
    """Choose one of the round choices by its name."""
    opened.page.locator(f"#{fieldset} label", has_text=re.compile(f"^{re.escape(name)}$")).click()


def slide(opened, selector, value):
    """Move a slider, as with the mouse."""
    opened.page.eval_on_selector(selector, "(input, value) => { input.value = value; "
                                           "input.dispatchEvent(new Event('input', {bubbles: true})); }", value)


def address(opened):
    return opened.wait("waitingToWrite === null && location.hash")  # it is written now and then


def empty(opened, text):
    """Empty a text that stands beside pictures: what is drawn next fills it again."""
    opened.page.evaluate(f"$('{text}').textContent = ''")


# ------------------------------------------------------------------------------------------------------------- make


def test_an_image_is_made_at_once_and_is_that_of_sample_py(opened, exported, checkpoint, tmp_path, monkeypatch):
    """The command that the page shows makes the image that it shows."""
    page = opened(exported, "#label=3&steps=6&guidance=2&seed=4&sampler=ddim")
    assert "the 3" in page.made()
    command = shlex.split(page.page.inner_text("#command"))
    assert command[:2] == ["python", "sample.py"] and command[2:4] == ["--checkpoint", "model.pt"]
    monkeypatch.chdir(checkpoint.parent)
    assert sample.main([*command[2:], "--output", str(tmp_path / "x.npz"), "--device", "cpu"]) == 0
    drawn = np.load(tmp_path / "x.npz")["arr_0"].reshape(-1).astype(int)
    assert np.abs(levels(page, "make-x") - drawn).max() <= 1 and drawn.std() > 10
    choose(page, "labels", "any")
    page.wait("film.done && $('told').textContent.includes('image without a label')")
    command = shlex.split(page.page.inner_text("#command"))
    assert sample.main([*command[2:], "--output", str(tmp_path / "x.npz"), "--device", "cpu"]) == 0
    drawn = np.load(tmp_path / "x.npz")["arr_0"].reshape(-1).astype(int)
    assert np.abs(levels(page, "make-x") - drawn).max() <= 1


def test_every_control_of_make_does_something(opened, exported):
    page = opened(exported, "#steps=4")
    page.made()
    images = [levels(page, "make-x")]
    changes = [lambda: choose(page, "labels", "2"), lambda: slide(page, "#sliders label:nth-child(1) input", 9),
               lambda: slide(page, "#sliders label:nth-child(2) input", 5),
               lambda: page.page.select_option("#sampler", "ddpm"), lambda: page.page.fill("#seed", "77"),
               lambda: click(page, "#another")]
    for change in changes:
        page.page.evaluate("$('told').textContent = ''")
        change()
        page.made()
        images.append(levels(page, "make-x"))
        assert (images[-1] != images[-2]).any(), len(images)
    assert page.page.input_value("#seed") != "77" and "label=2" in address(page) and "steps=9" in address(page)


def test_the_scrub_bar_the_strip_and_the_playback_show_the_steps(opened, exported):
    page = opened(exported, "#steps=5&label=1")
    page.made()
    final = levels(page, "make-x")
    assert (final == levels(page, "make-x0")).all() and "no noise is left" in page.page.inner_text("#mixture")
    slide(page, "#step", 0)
    assert (levels(page, "make-x") != final).any() and "0.00 · image + 1.00 · noise" in page.page.inner_text("#mixture")
    assert "step=0" in address(page)
    assert page.page.locator("#strip canvas").count() == 6
    page.page.locator("#strip canvas").nth(2).click()
    assert page.page.input_value("#step") == "2" and page.page.locator("#strip canvas.now").count() == 1
    click(page, "#play")
    page.wait("film.timer === null && film.at === 5")
    assert (levels(page, "make-x") == final).all()


def test_a_link_shows_the_same_picture(opened, exported):
    first = opened(exported, "#label=6&seed=123&steps=7&guidance=3&sampler=heun&step=3")
    first.made()
    second = opened(exported, address(first))
    second.made()
    assert (levels(first, "make-x") == levels(second, "make-x")).all() and second.page.input_value("#step") == "3"
    second.page.evaluate("location.hash = 'label=5&seed=9&steps=3'")
    second.wait("app.state.seed === 9 && film.done && film.frames.length === 4")
    assert second.page.evaluate("app.state.label") == 5


def test_a_link_shows_the_same_drawing(opened, exported):
    first = opened(exported, "#view=sketch&steps=1")
    first.made()
    click(first, "#clear")
    draw_a_stroke(first, [(0.3, 0.2), (0.6, 0.8)])
    slide(first, "#noise-slider input", 12)
    first.wait("$('guess-told').textContent.startsWith('t = 12:')")
    empty(first, "guess-told")
    choose(first, "sketch-labels", "4")
    first.wait("$('guess-told').textContent")
    choose(first, "halves", "top")
    link = address(first)
    assert len(link) < 700
    second = opened(exported, link)
    second.made()
    assert (levels(second, "pad") == levels(first, "pad")).all() and levels(second, "pad").any()
    assert second.page.evaluate("[app.state.t, app.state.told, app.state.keep]") == [12, 4, "top"]
    second.wait("$('guess-told').textContent.startsWith('t = 12:')")
    assert (levels(second, "sketch-x0") == levels(first, "sketch-x0")).all()


@pytest.mark.parametrize("hash", ["#view=sketch&drawing=AAAA&t=40&told=10&keep=all", "#view=sketch&drawing=%F0%9F%98",
"#label=99&steps=0&sampler=constructor&view=toString&model=7&guidance=-1&block=x",
                                  "#seed=-1&share=1e9&step=60&label=&steps=1.5", "#<img src=x onerror=alert(1)>"])
def test_an_address_that_makes_no_sense_is_ignored(opened, exported, hash):
    page = opened(exported, hash)
    assert "the 7" in page.made() and page.page.evaluate("app.state.steps") == 10


def test_an_image_that_takes_too_long_gives_way_to_the_last_change(opened, exported):
    page = opened(exported, "#steps=1")
    page.made()
    page.page.evaluate("""() => {
        const ask = app.engine.ask;
        app.engine.ask = () => new Promise(() => {});
        makeImage();
        app.engine.ask = ask;
        changeAndMake({seed: 5});
    }""")
    page.wait("film.done && film.job.seed === 5")


def test_the_command_is_copied(opened, exported):
    page = opened(exported, "#steps=1")
    page.made()
    page.page.evaluate("void (navigator.clipboard.writeText = async (text) => { window.copied = text; })")
    click(page, "#copy")
    command = page.page.inner_text("#command").replace("\n", " ")
    assert page.wait("window.copied").split() == command.split() and page.page.inner_text("#copy") == "Copied"
    page.page.evaluate("void (navigator.clipboard.writeText = async () => { throw new Error('forbidden'); })")
    click(page, "#copy")
    assert page.wait("getSelection().toString()").split() == command.split()
    page.page.evaluate("void (document.execCommand = () => false)")
    click(page, "#copy")
    page.wait("$('copy').textContent.startsWith('Selected')")


def test_a_dragged_slider_ends_with_its_last_image(opened, exported):
    page = opened(exported, "#steps=8&guidance=1&seed=3")
    page.made()
    page.page.evaluate("""async () => {
        const input = document.querySelector("#sliders label:nth-child(2) input");
        for (let value = 1; value <= 6; value += 0.25) {
            input.value = value;
            input.dispatchEvent(new Event("input"));
            await new Promise((resolve) => setTimeout(resolve, 10));
        }
    }""")
    page.wait("film.done && !film.again && film.job.guidance === 6")
    assert "--guidance_scale 6 " in page.page.inner_text("#command")
    images = drawn(page, [dict(label=7, sampler="dpmpp_2m", steps=8, guidance=6, seed=3)])
    assert page.page.evaluate("x => [...app.code.decode(x)]", images[0].tolist()) == levels(page, "make-x").tolist()


def test_without_motion_the_steps_are_not_played(opened, exported):
    page = opened(exported, "#steps=20", reduced_motion="reduce")
    page.made()
    click(page, "#another")
    assert page.page.evaluate("film.timer") is None


# ------------------------------------------------------------------------------------------------------------- draw


def draw_a_stroke(page, points):
    """Draw a line through points, each a share of the width and the height, with the mouse."""
    box = page.page.locator("#pad").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.page.mouse.move(*places[0])
    page.page.mouse.down()
    for place in places[1:]:
        page.page.mouse.move(*place, steps=5)
    page.page.mouse.up()


def test_a_drawing_is_noised_guessed_and_completed(opened, exported):
    page = opened(exported, "#view=sketch")
    page.made()
    click(page, "#clear")
    assert not levels(page, "pad").any()
    draw_a_stroke(page, [(0.3, 0.2), (0.3, 0.8)])
    drawing = levels(page, "pad").reshape(28, 28)
    assert drawing[10:20, 8].min() > 200 and drawing[:, 14:].max() == 0
    page.wait("$('guess-told').textContent.includes('t = ')")
    before = levels(page, "sketch-x")
    slide(page, "#noise-slider input", 0)
    page.wait("$('guess-told').textContent.startsWith('t = 0:')")
    assert np.abs(levels(page, "sketch-x") - drawing.reshape(-1)).mean() < np.abs(before - drawing.reshape(-1)).mean()
    guess = levels(page, "sketch-x0")
    empty(page, "guess-told")
    choose(page, "sketch-labels", "4")
    assert page.wait("$('guess-told').textContent") and page.page.evaluate("app.state.told") == 4
    assert (levels(page, "sketch-x0") != guess).any()
    choose(page, "halves", "left")
    click(page, "#complete")
    page.wait("$('complete-told').textContent.startsWith('Four proposals')")
    proposals = [levels(page, f"proposal-{i}").reshape(28, 28) for i in range(4)]
    for proposal in proposals:
        assert (proposal[:, :14] == drawing[:, :14]).all()
    assert (proposals[0][:, 14:] != proposals[1][:, 14:]).any()
    choose(page, "halves", "bottom")
    click(page, "#complete")
    page.wait("$('complete-told').textContent.includes('bottom half')")
    proposal = levels(page, "proposal-3").reshape(28, 28)
    assert (proposal[14:] == drawing[14:]).all() and (proposal[:14] != drawing[:14]).any()


def test_the_halves_are_what_they_are_called(opened, exported):
    page = opened(exported, "#steps=1")
    page.made()
    kept = page.page.evaluate("Object.fromEntries(Object.entries(HALVES).map(([name, half]) => "
                              "[name, [[0, 0], [3, 0], [0, 5], [3, 5]].map(([x, y]) => half(x, y, 4, 6))]))")
    assert kept == dict(left=[True, False, True, False], right=[False, True, False, True],
                        top=[True, True, False, False], bottom=[False, False, True, True])


def test_a_large_drawing_goes_into_an_address_and_back(opened, exported):
    page = opened(exported, "#steps=1")
    page.made()
    assert page.page.evaluate("""(() => {
        const levels = Uint8Array.from({length: 3 * 512 * 512}, (_, i) => i % 7 ? i % 256 : 0);
        const same = (paper) => unpackDrawing(packDrawing(levels, paper), levels.length, paper)
            .every((level, i) => level === levels[i]);
        const white = new Uint8Array(3 * 64 * 64).fill(255);
        return same(0) && same(255) && same(230) && packDrawing(white, 255).length < 200;
    })()""")


def test_what_is_chosen_shows_in_browsers_without_has_too(opened, exported, root):
    rules = (root / "web/page.css").read_text().splitlines()
    assert not [rule for rule in rules if ".chips" in rule and ":has(" in rule]
    page = opened(exported, "#view=sketch")
    colours = page.page.evaluate("""() => Object.fromEntries([...document.querySelectorAll("#pens input")].map(
        (each) => [each.checked, getComputedStyle(each.nextElementSibling).backgroundColor]))""")
    assert colours["true"] != colours["false"]


def test_pens_the_eraser_and_the_keyboard(opened, exported):
    page = opened(exported, "#view=sketch")
    page.made()
    sizes = []
    for pen in ("thin", "medium", "thick"):
        click(page, "#clear")
        choose(page, "pens", pen)
        draw_a_stroke(page, [(0.2, 0.5), (0.8, 0.5)])
        sizes.append(levels(page, "pad").sum())
    assert sizes == sorted(set(sizes))
    choose(page, "pens", "eraser")
    draw_a_stroke(page, [(0, 0.5), (1, 0.5)])
    assert levels(page, "pad").sum() < sizes[0]
    click(page, "#clear")
    choose(page, "pens", "medium")
    page.page.focus("#pad")
    for key in (" ", *5 * ["ArrowDown"], " ", "ArrowLeft"):
        page.page.keyboard.press(key)
    page.page.evaluate("$('pad').blur()")
    drawing = levels(page, "pad").reshape(28, 28)
    assert drawing[14:20, 14].min() > 200 and drawing[:, :12].max() == 0
    click(page, "#take")
    assert (levels(page, "pad") == levels(page, "make-x")).all()


def test_a_browser_without_coalesced_events_draws_lines_too(opened, exported):
    """Firefox for Android has the method, and gives none of them."""
    page = opened(exported, "#view=sketch&steps=1")
    page.made()
    click(page, "#clear")
    page.page.evaluate("void (PointerEvent.prototype.getCoalescedEvents = () => [])")
    draw_a_stroke(page, [(0.2, 0.5), (0.8, 0.5)])
    assert (levels(page, "pad").reshape(28, 28)[13:15, 7:21].max(0) > 200).all()


def test_the_pen_of_the_keyboard_is_lifted_when_another_one_draws(opened, exported):
    page = opened(exported, "#view=sketch&steps=1")
    page.made()
    click(page, "#clear")
    page.page.focus("#pad")
    page.page.keyboard.press(" ")
    assert page.page.evaluate("sketch.down") and page.page.inner_text("#pen-told") == "The pen is down."
    page.page.keyboard.down(" ")
    page.page.keyboard.down(" ")  # held: it repeats
    assert not page.page.evaluate("sketch.down") and page.page.inner_text("#pen-told") == "The pen is up."
    page.page.keyboard.up(" ")
    page.page.keyboard.press(" ")
    draw_a_stroke(page, [(0.1, 0.1), (0.2, 0.1)])
    before = levels(page, "pad")
    page.page.focus("#pad")
    page.page.keyboard.press("ArrowDown")
    page.page.evaluate("$('pad').blur()")
    assert not page.page.evaluate("sketch.down") and (levels(page, "pad") == before).all()


@pytest.mark.parametrize("view, show", [("sketch", "guess()"), ("inside", "look()")])
def test_while_something_is_dragged_answers_are_shown(opened, exported, view, show):
    """Also where an answer takes longer than a picture of the screen; the last one is of the last state."""
    page = opened(exported, f"#view={view}&steps=4")
    page.made()
    shown, asked = page.page.evaluate("""async (show) => {
        const ask = app.engine.ask.bind(app.engine), shown = [];
        let asked = 0;
        app.engine.ask = (slot, task, request, receive) => {
            asked++;
            return ask(slot, task, request, (part) => setTimeout(() => shown.push(request.t), 0)).then(
                (done) => new Promise((resolve) => setTimeout(() => resolve(done), 60)));  // a slow machine
        };
        for (let i = 0; i < 30; i++) {
            if (show === "guess()") app.setState({t: 10 + i}); else film.at = i % 5;
            eval(show);
            await new Promise(requestAnimationFrame);
        }
        const last = show === "guess()" ? app.state.t : Math.max(0, film.frames[4].t);
        const done = () => shown.length === asked && shown.at(-1) === last;
        for (const start = Date.now(); Date.now() < start + 20000 && !done();)
            await new Promise(requestAnimationFrame);
        app.engine.ask = ask;
        return [shown, asked];
    }""".replace("eval(show)", show), show)
    assert len(shown) == asked >= 2 and asked < 30
    assert shown[-1] == page.page.evaluate("app.state.t" if view == "sketch" else "Math.max(0, film.frames[4].t)")


def test_a_completion_ends_where_another_view_needs_the_worker(opened, exported):
    page = opened(exported, "#view=sketch&steps=2")
    page.made()
    page.page.evaluate("""() => new Promise((resolve) => {  // leave with its first part
        const ask = app.engine.ask.bind(app.engine);
        app.engine.ask = (slot, task, request, receive) => ask(slot, task, request, task !== "complete" ? receive
            : (part) => { receive(part); app.engine.ask = ask; app.open("make"); resolve(); });
        $("complete").click();
    })""")
    assert page.page.evaluate("$('proposals').childElementCount") == 0 and not page.page.inner_text("#complete-told")
    click(page, "#tab-sketch")
    click(page, "#complete")
    page.wait("$('complete-told').textContent.startsWith('Four')")
    click(page, "#tab-make")
    assert page.page.evaluate("$('proposals').childElementCount") == 4  # what is finished stays


# --------------------------------------------------------------------------------------------------- compare, inside


def test_only_the_first_finger_and_the_main_button_draw(opened, exported):
    page = opened(exported, "#view=sketch&steps=1")
    page.made()
    click(page, "#clear")
    page.page.evaluate("() => { $('pad').focus(); app.setState({drawing: null}); $('pad').blur(); }")
    assert page.page.evaluate("app.state.drawing") is None  # looking at the pad draws nothing
    box = page.page.locator("#pad").bounding_box()
    x, y = box["x"] + 0.4 * box["width"], box["y"] + 0.4 * box["height"]
    page.page.mouse.move(x, y)
    page.page.mouse.down(button="right")
    page.page.mouse.move(x + 30, y)
    page.page.mouse.up(button="right")
    assert not levels(page, "pad").any()
    page.page.mouse.down()
    before = levels(page, "pad")
    page.page.evaluate("([x, y]) => $('pad').dispatchEvent(new PointerEvent('pointermove', "
                       "{clientX: x, clientY: y, isPrimary: false, buttons: 1, bubbles: true}))", [x + 60, y + 60])
    assert before.any() and (levels(page, "pad") == before).all()
    page.page.mouse.move(x, y + 30)
    page.page.mouse.up()
    assert (levels(page, "pad") != before).any()


def test_keys_with_alt_belong_to_the_browser(opened, exported):
    page = opened(exported, "#steps=1")
    page.made()
    page.page.focus("#tab-make")
    page.page.keyboard.press("Alt+ArrowRight")
    assert page.page.evaluate("app.state.view") == "make"
    page.page.keyboard.press("ArrowRight")
    assert page.page.evaluate("app.state.view") == "sketch"


def test_fields_show_the_state(opened, exported):
    page = opened(exported, "#steps=1&guidance=2.3")
    page.made()
    assert page.page.inner_text("#sliders label:nth-child(2) output") == "2.3"
    page.page.fill("#seed", "-5")
    page.wait("app.state.seed === 0 && film.done")
    page.page.keyboard.press("Enter")
    assert page.page.input_value("#seed") == "0"
    page.page.evaluate("location.hash = 'steps=1&seed=9'")
    page.wait("app.state.seed === 9 && film.done")
    assert page.page.input_value("#seed") == "9"


def test_compare_shows_classes_a_table_and_what_lies_between(opened, exported):
    page = opened(exported, "#view=compare&steps=3&seed=2&a=5&b=8&share=0")
    page.made()
    page.wait("between.images.filter(Boolean).length === BETWEEN_FRAMES")
    pictures = page.page.evaluate(f"[...document.querySelectorAll('#classes canvas, #table canvas')].map({LEVELS})")
    assert len(pictures) == 10 + 25 and len({json.dumps(picture) for picture in pictures}) > 20
    assert (levels(page, "between") == levels(page, "end-a")).all()
    slide(page, "#share", 100)
    page.wait("$('share-text').textContent.startsWith('100 %')")
    assert (levels(page, "between") == levels(page, "end-b")).all()
    page.page.locator("#between-strip canvas").nth(6).click()
    assert "50 %" in page.page.inner_text("#share-text")
    page.page.fill("#seed-a", "8")
    page.wait("between.images.filter(Boolean).length === BETWEEN_FRAMES && app.state.a === 8")
    assert (levels(page, "end-a") == levels(page, "end-b")).all()
    page.page.fill("#seed-b", "11")
    page.wait("between.images.filter(Boolean).length === BETWEEN_FRAMES && app.state.b === 11")
    assert (levels(page, "end-a") != levels(page, "end-b")).any() and "b=11" in address(page)
    seed = page.page.evaluate("app.state.seed")
    click(page, "#new-noise")
    assert page.page.evaluate("app.state.seed") != seed
    page.page.locator("#classes canvas").nth(4).click()
    page.wait("app.state.view === 'make' && app.state.label === 4 && film.done")


def test_a_cell_of_the_table_is_shown_in_make(opened, exported):
    page = opened(exported, "#view=compare&label=any&steps=3&seed=2")
    page.made()
    page.wait("finished.table")
    assert page.page.inner_text("#table caption").startswith("The 0.")
    picture = page.page.locator("#table canvas").nth(2 * 5 + 3)
    shown = np.array(picture.evaluate(LEVELS))
    picture.click()
    page.wait("app.state.view === 'make' && film.done && film.timer === null")
    assert page.page.evaluate("film.job") == dict(label=0, sampler="dpmpp_2m", steps=8, guidance=1.5, seed=2)
    assert (levels(page, "make-x") == shown).all()


def test_compare_makes_again_only_what_has_changed(opened, exported):
    """Without a label the guidance changes the images of the classes, and nothing else."""
    page = opened(exported, "#view=compare&label=any&steps=2&guidance=1")
    page.made()
    page.wait("finished.between")
    page.page.evaluate("""() => {
        const ask = app.engine.ask;
        window.asked = [];
        app.engine.ask = function (...all) { window.asked.push(all[0]); return ask.apply(this, all); };
        location.hash = "view=compare&label=any&steps=2&guidance=5&share=90";
    }""")
    page.wait("film.job.guidance === 1 && finished.classes?.includes('\"guidance\":5') && asked.includes('share')")
    assert set(page.page.evaluate("asked")) == {"make", "classes", "share"}
    assert page.page.input_value("#share") == "90"


def test_the_curves_are_those_of_the_schedule_and_the_line_is_at_the_shown_step(opened, exported, checkpoint):
    page = opened(exported, "#view=inside&steps=4&step=2")
    page.made()
    process = load_model(checkpoint)[1]
    for name, share in (("signal", process.alpha), ("noise", process.sigma)):
        curve = page.page.get_attribute(f"#schedule path.{name}", "d")
        points = np.array(re.findall(r"([\d.]+),([\d.]+)", curve), float)
        assert len(points) == 101
        for x, y in points[::20]:
            assert (178 - y) / 166 == pytest.approx(float(share((588 - x) / 552 * 39)), abs=2e-3)
    for step in (2, 0, 4):
        slide(page, "#inside-step", step)
        t = page.page.evaluate("film.frames[film.at].t")
        assert float(page.page.get_attribute("#schedule line.now", "x1")) == pytest.approx(588 - max(t, 0) / 39 * 552)
        dots = page.page.locator("#schedule circle")
        assert [i for i in range(dots.count()) if dots.nth(i).get_attribute("class") == "now"] == [step]
        assert page.page.inner_text("#inside-t") == ("the image" if step == 4 else f"t = {round(t)}")


def test_a_schedule_of_one_time_is_drawn(opened, tmp_path):
    path = tmp_path / "page.html"
    model = small_checkpoint(tmp_path / "model.pt", num_timesteps=1)
    assert export.main(["--checkpoint", str(model), "--output", str(path)]) == 0
    page = opened(path, "#view=inside&steps=1")
    page.made()
    chart = page.page.inner_html("#schedule")
    assert "NaN" not in chart and chart.count("<circle") == 2


def test_inside_shows_the_schedule_and_the_channels_of_every_block(opened, exported):
    page = opened(exported, "#view=inside&steps=4&step=1")
    page.made()
    assert page.page.locator("#schedule circle").count() == 5
    page.wait("$('channels-text').textContent !== ''")
    names = page.page.eval_on_selector_all("#unet button", "buttons => buttons.map((button) => button.name)")
    assert names == ["stem", "downs.0", "middle", "ups.0", "head"]
    seen = set()
    for name, text in zip(names, ("8 channels of 14 × 14", "8 channels of 14 × 14", "16 channels of 7 × 7",
                                  "8 channels of 14 × 14", "4 channels of 14 × 14"), strict=True):
        page.page.evaluate("$('channels-text').textContent = ''")
        click(page, f"#unet button[name='{name}']")
        assert text in page.wait("$('channels-text').textContent")
        seen.add(levels(page, "channels").tobytes())
    assert len(seen) == 5 and "block=head" in address(page)
    empty(page, "channels-text")
    slide(page, "#inside-step", 3)
    page.wait("$('channels-text').textContent")
    assert levels(page, "channels").tobytes() not in seen and page.page.input_value("#step") == "3"


def test_the_keyboard_alone_is_enough(opened, exported):
    page = opened(exported, "#steps=2")
    page.made()
    page.page.focus("#tab-make")
    for name in (*TABS[1:], TABS[0]):
        page.page.keyboard.press("ArrowRight")
        assert page.page.evaluate("app.state.view") == name and page.page.is_visible(f"#{name}")
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("ArrowLeft")
    assert page.page.input_value("#step") == "1"
    page.page.focus("#labels input:checked")
    page.page.keyboard.press("ArrowRight")
    page.wait("app.state.label === 8 && film.done")
    page.page.focus("#tab-make")
    page.page.keyboard.press("End")
    page.page.focus("#unet button[name=middle]")
    page.page.keyboard.press("ArrowRight")
    assert page.page.evaluate("app.state.block") == "ups.0"


def open_everything(page):
    """Open all views, and yield the name of each when all that it shows is there."""
    for name in TABS:
        click(page, f"#tab-{name}")
        if name == "compare":
            page.wait("finished.between && $('between-strip').childElementCount")
        if name == "inside":
            page.wait("$('channels-text').textContent")
        yield name


def test_everything_that_can_be_used_has_a_name(opened, exported):
    page = opened(exported, "#steps=2")
    page.made()
    assert len([*open_everything(page)]) == 4
    nameless = page.page.evaluate("""[...document.querySelectorAll("button, input, select, [role=img]")].filter(
        (each) => !(each.textContent.trim() || each.getAttribute("aria-label") || each.labels?.length))""")
    assert nameless == []
    assert page.page.get_attribute("#told", "aria-live") == "polite"


@pytest.mark.parametrize("options", [PHONE, dict(viewport=dict(width=1200, height=900)),
                                     dict(viewport=dict(width=320, height=600))])
def test_every_view_fits_the_width(opened, exported, options):
    page = opened(exported, "#steps=2", **options)
    page.made()
    for name in open_everything(page):
        assert page.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), name


def test_light_and_dark_follow_the_system(opened, exported):
    colours = {}
    for scheme in ("light", "dark"):
        page = opened(exported, "#steps=1", color_scheme=scheme)
        page.made()
        colours[scheme] = page.page.evaluate("[document.body, document.querySelector('.card')].map((each) => "
                                             "getComputedStyle(each).backgroundColor)")
    assert colours["light"] != colours["dark"]


# ------------------------------------------------------------------------------------------------ other checkpoints


def test_words_of_a_checkpoint_become_neither_markup_nor_script(opened, tmp_path):
    evil = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">${1}"
    path = small_checkpoint(tmp_path / "<b>model's.pt", conditional=True)
    fields = {key: value for key, value in load_checkpoint(path).items() if key not in ("format", "version")}
    fields["config"]["data"] |= dict(dataset=evil, class_names=[evil, *fields["config"]["data"]["class_names"][1:]])
    save_checkpoint(path, **fields)
    assert export.main(["--checkpoint", str(path), "--output", str(tmp_path / "page.html")]) == 0
    page = opened(tmp_path / "page.html", "#label=0&steps=1")
    assert evil in page.made() and page.page.inner_text("#dataset") == evil
    for name in TABS:
        click(page, f"#tab-{name}")
    page.page.wait_for_timeout(300)
    assert page.page.title() == "Tiny Diffusion" and page.page.locator("img, b > b").count() == 0
    assert "'<b>model'\"'\"'s.pt'" in page.page.inner_text("#command")


def model_for_page(name="x.pt", shape=(1, 28, 28), names=("0", "1"), training=None, dataset=None, code=LINEAR,
                   **config):
    model = small_model(image_channels=shape[0], **config)
    process = DiffusionProcess(50, prediction="edm")
    return page_model(name, model, process, dict(
        model=model.config, diffusion=process.config, training=training or {},
        data=dict(dataset=dataset or name, shape=list(shape), class_names=list(names),
                  level_code=code.points.tolist())))


def test_long_names_of_many_classes_fit(opened):
    names = [f"african_elephant_{i}" for i in range(60)]
    names[30] = "a_very_long_name_without_any_place_to_break_it_" * 3
    page = opened([model_for_page(names=names, num_classes=60)], "#view=compare&label=15&steps=1",
                  viewport=dict(width=390, height=800))
    page.wait("$('classes').childElementCount && finished.classes")
    captions = page.page.locator("#classes figcaption").all_inner_texts()
    assert captions == names[15:55] and page.page.inner_text("#classes-title") == "One noise, 40 of 60 classes"
    for view in ("make", "sketch", "compare", "inside"):
        click(page, f"#tab-{view}")
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
    overlaps = page.page.evaluate("""() => [...document.querySelectorAll('#classes figcaption')].some(
        (each) => each.scrollWidth > each.clientWidth)""")
    assert not overlaps


def test_colours_without_labels(opened):
    page = opened([model_for_page(shape=(3, 32, 32))], "#view=sketch&steps=2")
    assert "image without a label" in page.made()
    assert page.page.is_visible("#ink") and not page.page.is_visible("#sketch-labels")
    click(page, "#clear")
    page.page.fill("#ink", "#00ff00")
    draw_a_stroke(page, [(0.5, 0.2), (0.5, 0.8)])
    colour = page.page.evaluate("[...$('pad').getContext('2d').getImageData(16, 16, 1, 1).data]")
    assert colour == [0, 255, 0, 255]
    for name in TABS:
        click(page, f"#tab-{name}")
    click(page, "#tab-make")
    assert "--label" not in page.page.inner_text("#command") and not page.page.is_visible("#labels")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("paper, ink", [(255, 0), (230, 0), (0, 255)])
def test_a_model_of_drawings_on_paper_is_drawn_for_on_such_paper(opened, channels, paper, ink):
    images = torch.randint(0, 256, (40, channels, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:, :, 8:] = paper
    page = opened([model_for_page(shape=(channels, 32, 32), code=histogram_code(images))], "#view=sketch&steps=2")
    page.made()
    click(page, "#clear")
    assert (levels(page, "pad") == paper).all()
    draw_a_stroke(page, [(0.5, 0.2), (0.5, 0.8)])
    drawing = levels(page, "pad").reshape(32, 32)
    assert drawing[16, 16] == ink and (drawing[:, :8] == paper).all()
    choose(page, "pens", "eraser")
    draw_a_stroke(page, [(0.5, 0.1), (0.5, 0.9)])
    assert (levels(page, "pad") == paper).all()


@pytest.mark.parametrize("training", [dict(student=True), dict(label_dropout=0.0)], ids=str)
def test_a_network_that_was_never_without_labels_is_not_asked_without(opened, training):
    page = opened([model_for_page(num_classes=2, training=training)], "#label=any&guidance=3&steps=1")
    page.made()
    assert page.page.evaluate("[app.state.label, app.state.guidance, app.state.told]") == [1, 1, 0]
    for fieldset in ("labels", "sketch-labels"):
        assert page.page.locator(f"#{fieldset} label").all_inner_texts() == ["0", "1"]
    assert not page.page.is_visible("text=Guidance by the label")
    assert "--guidance_scale 1 " in page.page.inner_text("#command").replace("\n", " ")
    click(page, "#tab-compare")
    page.wait("finished.table")
    assert page.page.inner_text("#table-title") == "Samplers and steps" and "Sampler" in page.page.inner_text("caption")


def test_a_student_draws_by_its_own_sampler(opened):
    page = opened([model_for_page(num_classes=2, training=dict(student=True))])
    page.made()
    assert page.page.evaluate("[app.state.sampler, app.state.steps, app.state.guidance]") == ["consistency", 2, 1]
    click(page, "#tab-sketch")
    assert not page.page.is_visible("#completion")


def test_a_switch_changes_the_model(opened):
    clothes = model_for_page("two.pt", names=("shoe", "coat", "bag"), num_classes=3, base_channels=12)
    page = opened([model_for_page("one.pt", num_classes=2), clothes])
    assert "the 1" in page.made() and page.page.is_visible("#models")
    choose(page, "models", "two.pt")
    page.wait("film.done && $('told').textContent.includes('bag')")
    assert "--checkpoint two.pt" in page.page.inner_text("#command") and "model=1" in address(page)
    choose(page, "models", "one.pt")
    page.wait("film.done && $('told').textContent.includes('the 1')")


def test_a_switch_amid_everything_leaves_nothing_of_the_old_model(opened):
    """Several switches before the first is done, while the steps are played, and from each view."""
    two = model_for_page("two.pt", names=("a", "b", "c"), num_classes=3, patch_size=1, channel_mults=[1, 2, 3])
    page = opened([model_for_page("one.pt", num_classes=2), two])
    page.made()
    for view in TABS:
        page.page.evaluate("""(view) => {
            app.open("make");
            $("another").click();
            app.open(view);
            for (const model of [1, 0, 1, 0, 1]) location.hash = `model=${model}&view=${view}&steps=2&seed=3`;
        }""", view)
        page.wait("app.entry.name === 'two.pt' && film.done && film.frames.length === 3")
        [image] = drawn(page, [dict(label=2, sampler="dpmpp_2m", steps=2, guidance=1.5, seed=3)], model=1)
        assert page.page.evaluate("x => [...app.code.decode(x)]", image.tolist()) == levels(page, "make-x").tolist()
        assert page.page.is_visible(f"#{view}") and page.page.locator("main > section:visible").count() == 1
        assert page.page.locator("#unet button").count() == 7
        page.page.evaluate("location.hash = `model=0&view=${app.shown}`")
        page.wait("app.entry.name === 'one.pt' && film.done")


def test_models_of_one_data_set_are_told_apart_by_their_files(opened):
    page = opened([model_for_page(name, dataset="glyphs") for name in ("one.pt", "two.pt")] + [model_for_page("x")])
    page.made()
    assert page.page.locator("#models label").all_inner_texts() == ["one.pt", "two.pt", "x"]


def test_an_address_closes_the_old_view(opened, exported):
    page = opened(exported, "#steps=1&view=compare")
    page.made()
    page.page.evaluate("() => { const close = compareView.close; "
                       "compareView.close = () => { close(); window.left = true; }; "
                       "location.hash = 'view=inside&steps=1'; }")
    page.wait("window.left && app.shown === 'inside' && film.done")
    assert page.page.is_visible("#inside") and not page.page.is_visible("#compare")


def test_an_address_on_an_open_page_shows_its_own_step_and_image(opened, exported):
    page = opened(exported, "#view=make&steps=3&seed=1")
    page.made()
    for given, shown in (("steps=5&step=2", 2), ("steps=4", 4), ("steps=3&step=1", 1), ("steps=2", 2)):
        page.page.evaluate("given => { location.hash = given; }", given)
        page.wait(f"film.done && film.frames.length === 1 + {given[6]}")
        assert page.page.evaluate("film.at") == shown
    before = levels(page, "make-x")
    page.page.evaluate("location.hash = 'view=sketch&steps=2&seed=2'")
    page.wait("app.state.seed === 2 && film.done && app.state.drawing")
    assert (levels(page, "pad") == levels(page, "make-x")).all() and (levels(page, "pad") != before).any()


def test_a_switch_leaves_no_picture_of_the_old_model_to_compare(opened):
    two = model_for_page("two.pt", names=("a", "b", "c"), num_classes=3)
    page = opened([model_for_page("one.pt", num_classes=2), two], "#view=compare&steps=1&share=90")
    page.wait("finished.between")
    assert page.page.input_value("#share") == "90"
    shown = page.page.evaluate("""() => new Promise((resolve) => {  // at once, before the worker has answered
        addEventListener("hashchange", () => resolve([
            $("classes").childElementCount, $("table").childElementCount, $("between-strip").childElementCount,
            between.images.length]));
        location.hash = "model=1&view=compare&steps=1";
    })""")
    assert shown == [3, 0, 0, 0]
    page.wait("app.entry.name === 'two.pt' && finished.between")


def test_the_way_back_leads_to_what_was_asked_for_last(opened):
    page = opened([model_for_page(name, num_classes=2) for name in ("one.pt", "two.pt")], "#steps=2&seed=1")
    page.made()
    page.page.evaluate("() => { app.setState({seed: 77}); document.querySelectorAll('#models input')[1].click(); }")
    page.wait("app.entry.name === 'two.pt' && film.done")
    page.page.evaluate("history.back()")
    page.wait("app.entry.name === 'one.pt' && app.state.seed === 77 && film.done")


def test_a_film_that_plays_is_no_step_of_the_address(opened, exported):
    page = opened(exported, "#steps=8")
    page.made()
    playing, stopped = page.page.evaluate("""() => new Promise((resolve) => {  // in the page: no film waits for a test
        const shown = () => [film.timer !== null, film.at, app.state.step];
        $("play").click();
        const looking = setInterval(() => {
            if (film.at < 2) return;
            clearInterval(looking);
            const playing = shown();
            $("play").click();
            resolve([playing, shown()]);
        }, 10);
    })""")
    at = playing[1]
    assert 2 <= at < 8 and playing == [True, at, None] and stopped == [False, at, at]


def test_an_address_counts_that_is_given_while_the_old_one_is_to_be_written(opened, exported):
    page = opened(exported, "#steps=1&seed=1")
    page.made()
    page.wait("waitingToWrite === null")
    page.page.evaluate("""() => {  // both timers are due when the busy one ends; the address is given first
        setTimeout(() => { for (const start = Date.now(); Date.now() < start + 600;); }, 100);
        setTimeout(() => { location.hash = "steps=2&seed=5"; }, 300);
        app.setState({});
    }""")
    page.wait("app.state.seed === 5 && film.done && film.frames.length === 3")
    page.wait("location.hash.includes('seed=5')")


@pytest.mark.parametrize("view", TABS)
def test_what_goes_wrong_is_told_in_every_view(view, opened, exported):
    page = opened(exported, f"#steps=1&view={view}")
    page.made()
    assert not page.page.is_visible("#problem")
    page.page.evaluate("void app.engine.ask('test', 'make', {model: 5, job: {}})")
    assert "did not work" in page.wait("$('problem').textContent")
    assert page.page.is_visible("[role=alert]")
    page.complaints.clear()
    first = page.page.inner_text("#problem")
    page.page.evaluate("complain('what follows from it')")
    assert page.page.inner_text("#problem") == first
    click(page, "#tab-make")
    assert not page.page.is_visible("#problem")
    page.page.evaluate("() => complain('this model', 'model')")
    click(page, "#tab-sketch")
    assert page.page.is_visible("#problem")  # until another one is chosen
    page.page.evaluate("() => { loadModel(app.entry, 0); app.open('make'); }")
    assert not page.page.is_visible("#problem")
    page.page.evaluate("() => { complain('a passing error'); app.engine.worker.onerror({message: 'no worker'}); }")
    click(page, "#tab-inside")
    assert "no worker" in page.page.inner_text("#problem")  # nothing works from now on


def test_the_weights_without_their_average_are_named_in_the_command(opened, checkpoint, tmp_path):
    assert export.main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.html"), "--no-use_ema"]) == 0
    page = opened(tmp_path / "x.html", "#steps=1")
    page.made()
    assert "--checkpoint model.pt --no-use_ema " in page.page.inner_text("#command").replace("\n", " ")


def test_the_newest_request_overtakes_the_others(opened, exported):
    page = opened(exported, "#view=sketch&steps=2")
    page.made()
    answers = page.page.evaluate("""async () => {
        const x0 = new Float32Array(784), seen = [], t = [...Array(40).keys()];
        const done = await Promise.all(t.map((t) => app.engine.ask("test", "guess", {model: 0, x0, t, label: null,
            seed: 0}, () => seen.push(t))));
        return [done.filter(Boolean).length, done.at(-1), seen.at(-1), seen.length];
    }""")
    assert answers[1:3] == [True, 39] and answers[0] < 40 and answers[3] < 40  # without overtaking both are 40


@pytest.mark.parametrize("name", sorted({"mnist", "fashion_mnist"} & set(checkpoints.pretrained_models())))
def test_pretrained_models_draw_what_they_are_asked_for(opened, name, tmp_path):
    """By the classifier that comes along; half precision changes the images by less than 5e-3."""
    path, count = tmp_path / "page.html", 20
    assert export.main(["--checkpoint", name, "--output", str(path)]) == 0
    assert path.stat().st_size < 4_000_000
    page = opened(path)
    page.made()
    jobs = [dict(label=k % 10, sampler="dpmpp_2m", steps=10, guidance=1.5, seed=k) for k in range(count)]
    images = drawn(page, jobs)
    model, diffusion, checkpoint = load_model(checkpoints.find_checkpoint(name))
    expected = torch.stack([draw(model, diffusion, checkpoint["config"], job) for job in jobs[:4]]).flatten(1)
    assert (images[:4] - expected).abs().max() < 5e-3
    decoded = torch.tensor(page.page.evaluate("images => images.map((x) => [...app.code.decode(x)])", images.tolist()))
    seen = extract_features(decoded.view(-1, 1, 28, 28).to(torch.uint8), load_feature_network(name)).probabilities
    assert (seen.argmax(1) == torch.arange(count) % 10).float().mean() > 0.8
