"""The page of `inspection.explore` in headless Chromium."""

import importlib
import json
import re
import time

import keras
import numpy as np
import pytest
from PIL import Image

import keras_tnt
from keras_tnt import inspection
from keras_tnt.cli import main
from tests.helpers.browser import PROGRAM, Browser, accessibility_violations, needs_axe
from tests.helpers.relevance_models import PYRAMID, TNT, VIT, images_for

pytestmark = pytest.mark.one_backend
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt-get install chromium")

NAMES = ["a cat", "<b>dog</b>", "owl", "</script>fox"]


def build(builder, arguments):
    model = builder(**arguments)
    draw = np.random.default_rng(1)
    for weight in model.trainable_variables:
        if weight.name == "kernel":
            weight.assign(0.4 * draw.normal(size=weight.shape))
    return model


@pytest.fixture(scope="module")
def tnt():
    return build(keras_tnt.TNT, {**TNT, "distilled": True, "name": "my_tnt"})


@pytest.fixture(scope="module")
def page(tnt, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    titles = ["%%ARRAYS%%.jpg", "second.jpg"]
    return inspection.explore(tnt, images_for(tnt), path, NAMES, titles=titles)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def state(browser):
    return browser.evaluate("({...state})")


def shares(text):
    return [float(x) / 100 for x in re.findall(r"([\d.]+)%", text)]


@needs_chromium
def test_page_makes_no_requests_and_logs_no_errors(browser, page):
    browser.open(page.as_uri())
    for _ in range(2):
        browser.press("]", "h", "c", "n", "p", "p")
    assert {url for url in browser.requests if not url.startswith("data:")} == {page.as_uri()}
    assert not browser.complaints
    # The page's Content Security Policy blocks requests.
    browser.evaluate("fetch('https://example.org/').catch(() => 0), 0")
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert not [url for url in browser.requests if "example.org" in url]
    assert "Content Security Policy" in json.dumps(browser.complaints)


@needs_chromium
def test_page_has_the_attention_of_attention_maps(browser, page, tnt):
    browser.open(page.as_uri())
    for i, image in enumerate(images_for(tnt)):
        browser.evaluate(f"set({{image: {i}}})")
        maps = inspection.attention_maps(tnt, image[None])
        for block in (0, 1):
            for kind in ("outer", "inner"):
                expected = maps[f"block_{block}/{kind}"][0]
                shown = np.reshape(
                    browser.evaluate(
                        f"(({{values}}, largest) => Array.from(values, (x, i) => x / 255 * "
                        f"largest.values[Math.floor(i / {expected.shape[-1]})]))"
                        f"(array('{block}/{kind}'), array('{block}/{kind}/largest'))"
                    ),
                    expected.shape,
                )
                error = np.abs(shown - expected) / expected.max(axis=-1, keepdims=True)
                assert error.max() <= 1.001 / 510


@needs_chromium
def test_hovering_shows_attention_and_relevance(browser, page, tnt):
    browser.open(page.as_uri() + "#reader=patch&patch=2&block=1&head=1&inner=0&word=3")
    maps = inspection.attention_maps(tnt, images_for(tnt)[:1])
    browser.point("#outer", 0.75, 0.25, press=False)  # row 1, column 2
    row = maps["block_1/outer"][0, 1, 2 + 2]
    assert browser.text("outer-read").startswith("patch 1, 2: ")
    assert abs(shares(browser.text("outer-read"))[0] - row[2 + 1]) <= row.max() / 510 + 5e-4
    browser.point("#inner", 0.1, 0.9, press=False)  # row 2, column 1
    row = maps["block_1/inner"][0, 2, 0, 3]
    assert browser.text("inner-read").startswith("word 2, 1: ")
    assert abs(shares(browser.text("inner-read"))[0] - row[2]) <= row.max() / 510 + 5e-4
    browser.point("#why", 0.1, 0.1, press=False)
    words = inspection.relevance(tnt, images_for(tnt)[:1], level="words")[0]
    found = None
    for _ in range(100):  # the text is updated after drawing
        if found := re.search(r": ([-+\d.e]+),", browser.text("why-read")):
            break
        time.sleep(0.05)
    assert found, browser.text("why-read")
    told = float(found[1])
    np.testing.assert_allclose(told, words[0, 0], atol=6e-5, rtol=6e-3)


@needs_chromium
def test_clicks_and_keys_change_the_state(browser, page):
    browser.open(page.as_uri())
    browser.point("#outer", 0.75, 0.75)
    assert (state(browser)["patch"], state(browser)["reader"]) == (3, "patch")
    browser.press("ArrowLeft", "ArrowUp", "ArrowUp")
    assert state(browser)["patch"] == 0
    browser.press("[", "[", "[")
    assert state(browser)["block"] == 0 and browser.text("block-name") == "block 1 of 2"
    browser.point("#steps button:last-child")
    assert state(browser)["block"] == 1
    before = browser.evaluate("$('outer').toDataURL()")
    browser.press("c")
    assert "The class token attends to" in browser.text("outer-says")
    assert browser.evaluate("$('outer').toDataURL()") != before
    browser.point("#readers button:last-child")
    assert "The distillation token attends to" in browser.text("outer-says")
    browser.press("h", "h")
    assert str(state(browser)["head"]) == "1"
    browser.point("#inner", 0.99, 0.01)
    browser.evaluate("$('inner').focus()")
    browser.press("ArrowDown", "ArrowLeft", "H")
    assert state(browser)["word"] == 2 and str(state(browser)["inner"]) == "1"
    browser.point("#classes button:nth-child(2)")
    assert state(browser)["class"] == 1
    browser.point("#levels button")
    assert state(browser)["level"] == "patches"
    browser.press("n")
    assert state(browser)["image"] == 1
    browser.point("#play")
    assert "Pause" in browser.text("play")
    browser.point("#play")
    assert "Play" in browser.text("play")


@needs_chromium
def test_link_restores_the_view(browser, page):
    browser.open(page.as_uri())
    browser.press("n", "ArrowRight", "[", "h")
    browser.evaluate("set({word: 1, class: 2, level: 'patches'})")
    link, wanted = browser.evaluate("location.href"), state(browser)
    drawn = browser.evaluate("$('outer').toDataURL() + $('why').toDataURL()")
    browser.open(link)
    assert {k: str(v) for k, v in state(browser).items()} == {k: str(v) for k, v in wanted.items()}
    assert browser.evaluate("$('outer').toDataURL() + $('why').toDataURL()") == drawn
    browser.open(page.as_uri() + "#image=99&block=-1&head=x&class=7&level=pixels&reader=me")
    assert state(browser)["image"] == 0 and state(browser)["class"] == 0


@needs_chromium
def test_view_is_saved_as_png(browser, page, tmp_path):
    browser.open(page.as_uri())
    browser.call(
        "Browser.setDownloadBehavior",
        behavior="allow",
        downloadPath=str(tmp_path),
        eventsEnabled=True,
    )
    browser.point("#save")
    browser.read_until(lambda event: event.get("params", {}).get("state") == "completed")
    (file,) = tmp_path.iterdir()
    assert file.name == "my_tnt_view.png" and file.read_bytes().startswith(b"\x89PNG")


@needs_chromium
@pytest.mark.parametrize("width", [390, 820, 1440])
def test_page_fits_phone_tablet_and_desktop(browser, page, width):
    for dark in (False, True):
        browser.open(page.as_uri(), width, 900, dark)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(
            "['outer', 'inner', 'why'].every(id => $(id).getBoundingClientRect().width > 250)"
        )
        light = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (light == "rgb(20, 21, 26)") == dark
        assert len(browser.picture()) > 20_000


@needs_chromium
def test_controls_have_accessible_names(browser, page):
    browser.open(page.as_uri())
    unnamed = """[...document.querySelectorAll('button, input, canvas[tabindex], [role=group]')]
        .filter(e => !(e.textContent.trim() || e.ariaLabel)).map(e => e.outerHTML)"""
    assert browser.evaluate(unnamed) == []
    assert "2 by 2 patches" in browser.evaluate("$('outer').ariaLabel")
    assert browser.evaluate("$('classes').children.length") == 4
    names = browser.evaluate("[...$('classes').children].map(e => e.firstChild.textContent)")
    assert sorted(names) == sorted(NAMES)


@needs_chromium
def test_photo_prediction_and_file_name_come_first(browser, page, tnt):
    browser.open(page.as_uri())
    order = browser.evaluate("[...document.querySelectorAll('canvas, h1, h2')].map(e => e.id)")
    assert order[:2] == ["photo", "heading"]
    assert browser.evaluate("$('photo').getBoundingClientRect().top") < 100
    probabilities = tnt.predict(images_for(tnt), verbose=0)
    for i, name in enumerate(("%%ARRAYS%%.jpg", "second.jpg")):
        browser.evaluate(f"set({{image: {i}}})")
        assert browser.text("heading") == name
        assert browser.evaluate("document.title") == f"{name} – my_tnt"
        best = probabilities[i].argmax()
        answer = browser.text("answer")
        assert answer.startswith(f"{NAMES[best]}, ")
        assert shares(answer)[0] == pytest.approx(probabilities[i, best], abs=6e-4)


@needs_chromium
@pytest.mark.parametrize(
    "control", ["#classes button", "#steps button", "#images button", "#outer-heads button"]
)
def test_activated_control_keeps_the_focus(browser, page, control):
    browser.open(page.as_uri())
    browser.evaluate(f"document.querySelectorAll('{control}')[1].focus()")
    for _ in range(2):
        browser.evaluate("document.activeElement.click()")
        assert browser.evaluate(f"[...document.querySelectorAll('{control}')]"
                                ".indexOf(document.activeElement)") == 1  # fmt: skip


@needs_chromium
def test_keyboard_changes_are_announced(browser, page):
    browser.open(page.as_uri())
    for canvas, frame in (("outer", "The framed patch (row"), ("inner", "The framed word (row")):
        browser.evaluate(f"$('{canvas}').focus()")
        for key in ("ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft"):
            browser.press(key)
            announced = browser.text(f"{canvas}-read")
            assert announced.startswith(frame) and "Most: " in announced, key
    assert browser.evaluate("$('outer-read').ariaLive") == "polite"
    browser.evaluate("$('why').focus()")
    browser.press("ArrowRight")
    assert browser.text("why-read").startswith("Patch at row ")
    browser.press("[")
    assert browser.text("announce").startswith("block 1 of 2. Prediction after block 1: ")
    browser.press("h")
    assert browser.text("announce").startswith("Outer attention, head 1. Most: ")
    browser.press("n")
    assert browser.text("announce").startswith(browser.text("heading"))


@needs_chromium
def test_single_key_shortcuts_can_be_disabled(browser, page):
    browser.open(page.as_uri())
    browser.evaluate("$('outer').focus()")
    browser.point("#shortcuts")
    assert browser.evaluate("$('shortcuts').ariaChecked") == "false"
    before = state(browser)
    browser.evaluate("$('outer').focus()")
    browser.press("[", "]", "h", "H", "c", " ", "p", "n")
    assert state(browser) == before and "Play" in browser.text("play")
    browser.press("ArrowDown", "ArrowUp")  # arrow keys still work
    assert browser.text("outer-read")
    browser.open(page.as_uri())  # the setting is saved
    browser.press("p")
    assert state(browser)["heat"] == 1
    browser.point("#shortcuts")
    browser.press("p")
    assert state(browser)["heat"] == 0


@needs_chromium
def test_fixed_scale_is_shared_by_all_heads_and_blocks(browser, page):
    browser.open(page.as_uri())
    fixed, free = set(), set()
    for scale, found in (("fixed", fixed), ("stretched", free)):
        for block in (0, 1):
            for head in (0, 1):
                browser.evaluate(f"set({{scale: '{scale}', block: {block}, head: {head}}})")
                found.add(browser.text("outer-legend"))
    assert len(fixed) == 1 and len(free) == 4
    colors = "[.001, .1, 1].map(x => color(within(x, FIXED.outer)).join())"
    assert len(set(browser.evaluate(colors))) == 3


@needs_chromium
def test_numbers_are_rounded_for_display(browser, page):
    browser.open(page.as_uri())
    written = browser.evaluate("[0.1 + 0.2, 1e-17, 0, 1.5e-5, 123.456, -0.25, NaN].map(number)")
    assert written == ["0.3", "0", "0", "1.5×10⁻⁵", "123", "-0.25", "not finite (NaN or infinity)"]
    written = browser.evaluate("[0.1 + 0.2, 1e-17, 3e-5, 0.0123, 0.99999, 1].map(percent)")
    assert written == ["30.0%", "0%", "<0.01%", "1.23%", ">99.9%", "100%"]
    noise = re.compile(r"\d\.\d{8}|e-\d")
    for scale in ("fixed", "stretched"):
        for level in ("words", "patches"):
            browser.evaluate(f"set({{scale: '{scale}', level: '{level}'}})")
            for name in ("outer", "inner", "why"):
                assert not noise.search(browser.text(f"{name}-legend"))
    assert not re.search(r"\.\d{10}", page.read_text(encoding="utf-8").split("</script>")[0])


@needs_chromium
def test_page_uses_attention_vocabulary(browser, page):
    browser.open(page.as_uri())
    for change in ("{}", "{reader: 'class', block: 1}"):
        browser.evaluate(f"set({change})")
        text = browser.evaluate("document.body.innerText")
        assert not re.search(r"\b(reads?|told|tells?)\b", text)
        assert "attends to" in text and "Relevance" in text


@needs_chromium
@needs_axe
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_has_no_wcag_violations(browser, page, dark, width):
    browser.open(page.as_uri(), width, 900, dark)
    assert accessibility_violations(browser) == []
    browser.point("#classes button:nth-child(2)")
    browser.point("#steps button")
    browser.point("#images button:nth-child(2)")
    browser.point("#shortcuts")
    browser.press("ArrowRight")
    assert accessibility_violations(browser) == []
    browser.evaluate("set({level: 'words', scale: 'fixed', heat: 0, reader: 'class'})")
    assert accessibility_violations(browser) == []
    browser.point("#shortcuts")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pressed_button_bars_have_a_contrast_of_3_to_1(browser, page, dark):
    browser.open(page.as_uri(), dark=dark)
    pairs = browser.evaluate(
        "[...document.querySelectorAll('#steps i, #classes i')].map(bar => [bar, "
        "bar.closest('button')].map(e => getComputedStyle(e).backgroundColor))"
    )
    assert len(pairs) == 6
    for pair in pairs:
        lighter, darker = sorted((luminance(color) for color in pair), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3, pair


def luminance(color):
    """Returns the relative luminance of `rgb(r, g, b)` as defined by WCAG."""
    parts = [int(x) / 255 for x in re.findall(r"\d+", color)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@needs_chromium
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_maps_are_flagged(browser, tnt, tmp_path, monkeypatch, value):
    module = importlib.import_module("keras_tnt.inspection.explore")
    attention_maps, relevance_map = module.attention_maps, module.flow.relevance_map

    def broken_attention(model, images):
        maps = {name: np.array(x) for name, x in attention_maps(model, images).items()}
        maps["block_1/outer"][:, 0, 2] = value
        return maps

    def broken_relevance(*arguments):
        maps = relevance_map(*arguments)
        maps[0, 0, 1] = value
        return maps

    monkeypatch.setattr(module, "attention_maps", broken_attention)
    monkeypatch.setattr(module.flow, "relevance_map", broken_relevance)
    path = inspection.explore(tnt, images_for(tnt, 1), tmp_path / "page.html", NAMES)
    browser.open(path.as_uri() + "#block=1&patch=0&reader=patch&head=0")
    assert not browser.complaints
    assert "outer attention of block 2, relevance of patches" in browser.text("problem")
    assert browser.evaluate("!$('problem').hidden")
    assert "not finite" in browser.text("outer-most") and "not finite" in browser.text(
        "outer-legend"
    )
    browser.evaluate("set({head: 1})")
    assert "not finite" not in browser.text("outer-legend") + browser.text("outer-most")
    assert "not finite" in browser.text("why-legend")
    browser.point("#why", 0.3, 0.05, press=False)
    assert browser.text("why-read") == "word 1, 2: not finite (NaN or infinity)"


@needs_chromium
@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_scores_are_the_outputs_of_the_model(browser, activation, tmp_path):
    model = build(keras_tnt.DeiT, {**VIT, "classes": 1, "classifier_activation": activation})
    image = images_for(model, 1)
    path = inspection.explore(model, image, tmp_path / "page.html", ["fox"])
    output = float(model.predict(image, verbose=0)[0, 0])
    found = described(path)["images"][0]
    assert found["classes"][0]["probability"] == pytest.approx(output, rel=1e-4)
    assert found["depths"][-1]["probability"] == pytest.approx(output, rel=1e-4)
    browser.open(path.as_uri())
    shown = float(re.search(r"fox, ([-\d.]+)", browser.text("answer"))[1])
    assert shown == pytest.approx(100 * output if activation else output, rel=0.02)
    assert ("%" in browser.text("answer")) == bool(activation)
    assert ("logit" in browser.text("by")) == (not activation)
    assert not browser.complaints


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    ("builder", "arguments", "parts"),
    [
        (
            "DeiT",
            {**VIT, "distilled": True},
            {"inner": False, "tokens": 2, "depths": 2, "blocks": 2},
        ),
        (
            "CaiT",
            {**VIT, "layer_scale": 0.5},
            {"inner": False, "tokens": 1, "depths": 2, "blocks": 4},
        ),
        ("PyramidTNT", PYRAMID, {"inner": True, "tokens": 0, "depths": 1, "blocks": 4}),
    ],
)
def test_page_of_other_families_has_their_attention(browser, builder, arguments, parts, tmp_path):
    model = build(getattr(keras_tnt, builder), arguments)
    images = images_for(model, 1)
    path = inspection.explore(model, images, tmp_path / "page.html")
    browser.open(path.as_uri())
    assert browser.evaluate("!$('inner-card').hidden") == parts["inner"]
    assert browser.evaluate("page.tokens.length") == parts["tokens"]
    assert browser.evaluate("page.images[0].depths.length") == parts["depths"]
    assert browser.evaluate("page.blocks.length") == parts["blocks"]
    for block in range(parts["blocks"]):
        for reader in ("class", "patch"):
            browser.evaluate(f"set({{block: {block}, reader: '{reader}'}})")
            total = "(({values, tokens}) => [...values, ...tokens].reduce((a, b) => a + b))"
            assert abs(browser.evaluate(f"{total}(outerAttention())") - 1) < 0.02
    assert not browser.complaints


# === File contents ===


def described(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="page">(.*?)</script>', text, re.DOTALL)[1])


def test_last_depth_is_the_prediction(page, tnt):
    for found, image in zip(described(page)["images"], images_for(tnt), strict=True):
        probabilities = tnt.predict(image[None], verbose=0)[0]
        last = found["depths"][-1]
        np.testing.assert_allclose(last["probability"], probabilities.max(), atol=1e-6)
        best = NAMES[probabilities.argmax()]
        assert found["classes"][0]["name"] == last["name"] == best
    assert len(described(page)["images"][0]["depths"]) == 2


def test_channels_first_model_has_the_same_page(page, tnt, tmp_path):
    keras.config.set_image_data_format("channels_first")
    arguments = {**TNT, "distilled": True, "input_shape": (3, 16, 16), "name": "my_tnt"}
    first = keras_tnt.TNT(**arguments)
    first.set_weights(tnt.get_weights())
    images = np.moveaxis(images_for(tnt), -1, 1)
    path = inspection.explore(first, images, tmp_path / "page.html", NAMES)
    assert described(path)["layout"] == described(page)["layout"]
    np.testing.assert_allclose(
        [c["probability"] for c in described(path)["images"][1]["classes"]],
        [c["probability"] for c in described(page)["images"][1]["classes"]],
        atol=1e-5,
    )


def test_invalid_arguments_raise(tnt, tmp_path, monkeypatch):
    images = images_for(tnt)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        inspection.explore(tnt, images, tmp_path)
    with pytest.raises(ValueError, match="must have 4 names.*Received: 1"):
        inspection.explore(tnt, images, tmp_path / "a.html", ["cat"])
    with pytest.raises(ValueError, match="one for each of 2 images"):
        inspection.explore(tnt, images, tmp_path / "a.html", titles=["a"])
    with pytest.raises(ValueError, match="takes a batch of images"):
        inspection.explore(tnt, images[0], tmp_path / "a.html")
    with pytest.raises(ValueError, match="no image"):
        inspection.explore(tnt, images[:0], tmp_path / "a.html")
    module = importlib.import_module("keras_tnt.inspection.explore")
    monkeypatch.setattr(module, "LARGEST_PAGE", 20_000)
    with pytest.raises(ValueError, match=r"A page holds \d images of this model.*Received: 9"):
        inspection.explore(tnt, images_for(tnt, 9), tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_non_finite_images_and_weights_raise(tnt, tmp_path, capsys):
    images = images_for(tnt)
    for value in (np.nan, np.inf, -np.inf):
        broken = images.copy()
        broken[1, 3, 5, 0] = value
        with pytest.raises(ValueError, match="`images` must have finite values. b.png has 1 of "):
            inspection.explore(tnt, broken, tmp_path / "a.html", titles=["a.png", "b.png"])
        with pytest.raises(ValueError, match="Image 2 of 2 has 1 of "):
            inspection.relevance(tnt, broken)
        with pytest.raises(ValueError, match="Image 2 of 2 has 1 of "):
            inspection.faithfulness(tnt, broken, np.ones((2, 2, 2)))
        with pytest.raises(ValueError, match="The image has 1 of "):
            inspection.plot_attention(tnt, broken[1], tmp_path / "a.png")
    for value in (np.nan, np.inf):
        model = build(keras_tnt.TNT, {**TNT, "name": "diverged"})
        weight = model.get_layer("block_1").weights[0]
        weight.assign(np.full(weight.shape, value))
        message = "'diverged' returns logits that are not finite.*for Image 1.*block_1/"
        with pytest.raises(ValueError, match=message):
            inspection.explore(model, images, tmp_path / "a.html")
        with pytest.raises(ValueError, match="not finite.*block_1/"):
            inspection.relevance(model, images)
        with pytest.raises(ValueError, match="not finite.*block_1/"):
            inspection.faithfulness(model, images, np.ones((2, 2, 2)))
        with pytest.raises(ValueError, match="attention of 'block_1/.*block_1/"):
            inspection.plot_attention(model, images[0], tmp_path / "a.png")
    model.save(tmp_path / "model.keras")
    Image.fromarray(np.zeros((20, 30, 3), "uint8")).save(tmp_path / "cat.jpg")
    page = tmp_path / "out.html"
    flags = [f"--model={tmp_path}/model.keras", f"--out={page}"]
    assert main(["explain", f"{tmp_path}/cat.jpg", *flags]) == 2
    assert "not finite (NaN or infinity) for cat.jpg" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.jpg", "model.keras"]


def test_explain_command_writes_a_page(tnt, tmp_path, capsys):
    tnt.save(tmp_path / "model.keras")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), "uint8")
    for name in ("b.png", "a.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    page = tmp_path / "out.html"
    assert main(["explain", str(tmp_path), f"--model={tmp_path}/model.keras", f"--out={page}"]) == 0
    assert [found["title"] for found in described(page)["images"]] == ["a.png", "b.png"]
    assert "<title>a.png – " in page.read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == str(page)
    assert main(["explain", f"{tmp_path}/c.png", f"--model={tmp_path}/model.keras"]) == 2
    assert "There is no image file" in capsys.readouterr().err
