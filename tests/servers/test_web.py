"""The browser page gives the same predictions as Python."""

import functools
import http.server
import shutil
import threading
import time
import types

import keras
import numpy as np
import pytest
from PIL import Image

import keras_tnt
from keras_tnt.export.verification import draw_picture
from tests.helpers.browser import PROGRAM, Browser, accessibility_violations, needs_axe
from tests.helpers.image_cases import CASES, REFUSED
from tests.helpers.subprocess_helpers import ROOT

WEB = ROOT / "savedmodels" / "web"
pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        not (WEB / "node_modules").is_dir(), reason="no onnxruntime-web: `make servers` brings it"
    ),
]
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "<b>gnü</b>"]
# Relative to the logits' peak-to-peak range. Decoding and resizing are identical; only float32
# arithmetic differs.
TOLERANCE = 1e-3
KINDS_TOLERANCE = 5e-3  # decoders may differ by 1 of 255


def build(**options):
    keras.utils.set_random_seed(0)
    return keras_tnt.TNT(
        input_shape=(48, 64, 3), outer_dim=32, inner_dim=8, depth=2, outer_heads=2, inner_heads=2,
        class_names=NAMES, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Yields the page's directory with two models and pictures, and its loopback address.

    For a URL ending in `?slowly`, the server sends half of the file, and the rest after
    `release()`.
    """
    from skimage import data

    folder = tmp_path_factory.mktemp("web")
    for name in ("index.html", "classify.js"):
        shutil.copy(WEB / name, folder)
    (folder / "node_modules").symlink_to(WEB / "node_modules")
    models = {"pixels": build(), "outside": build(include_preprocessing=False)}
    for name, model in models.items():
        keras_tnt.export.onnx(model, folder / f"{name}.onnx")
    (folder / "broken.onnx").write_bytes((folder / "pixels.onnx").read_bytes()[:5000])
    for name in ("chelsea", "astronaut", "coffee", "rocket"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.jpg", quality=92)
    turned = Image.fromarray(data.chelsea())
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    clear = Image.fromarray(np.dstack([data.coffee(), data.coffee()[..., :1]]))
    clear.resize((150, 100)).save(folder / "clear.png")
    (folder / "drawn.webp").write_bytes(draw_picture(2))
    (folder / "small.png").write_bytes(draw_picture(1))
    (folder / "none.jpg").write_bytes(b"no image")
    (folder / "compressed.bmp").write_bytes(REFUSED["RLE"])
    (folder / "kinds").mkdir()
    for place, (file, _) in enumerate(CASES.values()):
        (folder / "kinds" / f"{place}.bin").write_bytes(file)

    released = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def copyfile(self, source, target):
            if ".onnx?slowly" not in self.path:
                return super().copyfile(source, target)
            data = source.read()
            target.write(data[: len(data) // 2])
            released.wait(timeout=60)
            target.write(data[len(data) // 2 :])

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/index.html"
        yield types.SimpleNamespace(
            folder=folder, models=models, address=address, release=released.set
        )
        released.set()
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def wait(browser, condition):
    end = time.monotonic() + 120
    while not browser.evaluate(condition):
        assert time.monotonic() < end, (browser.text("said"), browser.complaints)
        time.sleep(0.05)


def choose(browser, identifier, path):
    """Selects a file in a file input, as a user does."""
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector=f"#{identifier}")["nodeId"]
    browser.evaluate("window.answer = null; document.getElementById('said').textContent = '...'")
    browser.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)


@pytest.mark.parametrize("name", ["pixels", "outside"])
def test_browser_predictions_match_python(name, site, browser):
    folder, address, model = site.folder, site.address, site.models[name]
    browser.open(f"{address}?model={name}.onnx")
    wait(browser, "document.getElementById('said').textContent == 'Choose a photo.'")
    logits = keras.Model(model.inputs[0], model.layers[-1].input)
    paths = sorted(p for p in folder.iterdir() if p.suffix in (".jpg", ".png", ".webp"))
    for path in paths:
        if path.name == "none.jpg":
            continue
        choose(browser, "photo", path)
        wait(browser, "window.answer !== null")
        answer = browser.evaluate("window.answer")
        images = keras_tnt.load_image(path, model)[None]
        if name == "outside":
            images = keras_tnt.tnt.preprocess_input(images)
        expected = logits.predict(images, verbose=0)[0]
        worst = np.abs(np.array(answer["logits"]) - expected).max() / np.ptp(expected)
        print(f"{name} {path.name}: {worst:.1e} of the logits' spread")
        assert worst <= TOLERANCE, path.name
        assert answer["classes"][0][0] == NAMES[expected.argmax()]
    assert browser.complaints == []
    shown = browser.evaluate("document.querySelector('#classes span').textContent")
    assert shown.startswith(answer["classes"][0][0])  # class names are escaped


def test_every_image_format_is_decoded_as_in_python(site, browser):
    folder, address = site.folder, site.address
    model = site.models["pixels"]
    browser.open(f"{address}?model=pixels.onnx")
    wait(browser, "document.getElementById('said').textContent == 'Choose a photo.'")
    logits = keras.Model(model.inputs[0], model.layers[-1].input)
    expected = logits.predict(
        keras_tnt.load_images([file for file, _ in CASES.values()], model), verbose=0
    )
    for place, name in enumerate(CASES):
        choose(browser, "photo", folder / "kinds" / f"{place}.bin")
        wait(browser, "window.answer !== null")
        answer = np.array(browser.evaluate("window.answer")["logits"])
        worst = np.abs(answer - expected[place]).max() / np.ptp(expected[place])
        assert worst <= KINDS_TOLERANCE, name


def test_unreadable_models_and_images_show_an_error(site, browser):
    folder, address = site.folder, site.address
    browser.open(address)
    choose(browser, "model", folder / "broken.onnx")
    wait(browser, "document.getElementById('said').textContent.startsWith('This is no ONNX file')")
    choose(browser, "model", folder / "pixels.onnx")
    wait(browser, "document.getElementById('said').textContent == 'Choose a photo.'")
    choose(browser, "photo", folder / "none.jpg")
    said = "document.getElementById('said').textContent"
    wait(browser, f"{said}.startsWith('This cannot be read as an image.')")
    choose(browser, "photo", folder / "compressed.bmp")
    wait(browser, f"{said}.startsWith('A compressed BMP')")
    choose(browser, "photo", folder / "chelsea.jpg")
    wait(browser, "window.answer !== null")
    browser.open(f"{address}?model=nowhere.onnx")
    wait(browser, "document.getElementById('said').textContent == 'There is no nowhere.onnx here.'")


def test_progress_is_shown_while_a_model_is_fetched_and_a_photo_classified(site, browser):
    size = (site.folder / "pixels.onnx").stat().st_size
    browser.open(f"{site.address}?model=pixels.onnx%3Fslowly")
    wait(browser, f"document.getElementById('progress').value == {size // 2 / size}")
    assert browser.text("said") == f"Fetching the model: {size / 2e6:.1f} of {size / 1e6:.1f} MB"
    assert browser.evaluate("document.getElementById('progress').max") == 1
    assert browser.evaluate("document.getElementById('said').role") == "status"
    # A photo that is selected during the download is classified once the model is loaded.
    choose(browser, "photo", site.folder / "chelsea.jpg")
    browser.evaluate(
        "((said, progress) => { window.seen = []; new MutationObserver(() => seen.push("
        "[said.textContent, progress.hidden])).observe(said, {childList: true}) })"
        "(document.getElementById('said'), document.getElementById('progress'))"
    )
    site.release()
    wait(browser, "window.answer !== null")
    seen = browser.evaluate("window.seen")
    assert ["Preparing the model...", False] in seen
    assert ["Classifying the photo...", False] in seen
    wait(browser, "document.getElementById('progress').hidden")
    best = browser.evaluate("window.answer.classes[0][0]")
    assert browser.text("said").startswith(f"{best}, ")  # the status element announces the result


def test_errors_have_the_alert_role(site, browser):
    said = "document.getElementById('said')"
    browser.open(site.address)
    for name, text in (("none.jpg", "This is no ONNX file."), ("broken.onnx", "This is no ONNX")):
        choose(browser, "model", site.folder / name)
        wait(browser, f"{said}.textContent.startsWith('{text}')")
        assert browser.evaluate(f"{said}.role") == "alert"
        assert browser.evaluate("document.getElementById('progress').hidden")
    choose(browser, "model", site.folder / "pixels.onnx")
    wait(browser, f"{said}.textContent == 'Choose a photo.'")
    assert browser.evaluate(f"{said}.role") == "status"


@needs_axe
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_has_no_wcag_violations(site, browser, dark, width):
    browser.open(f"{site.address}?model=pixels.onnx", width, 900, dark)
    assert accessibility_violations(browser) == []
    wait(browser, "document.getElementById('said').textContent == 'Choose a photo.'")
    choose(browser, "photo", site.folder / "coffee.jpg")
    wait(browser, "window.answer !== null")
    assert accessibility_violations(browser) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    choose(browser, "photo", site.folder / "none.jpg")
    wait(browser, "document.getElementById('said').role == 'alert'")
    assert accessibility_violations(browser) == []
