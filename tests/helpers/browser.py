"""Headless Chromium, controlled over pipes with the DevTools protocol."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
AXE = Path(__file__).parent.parent / "node_modules" / "axe-core" / "axe.min.js"
needs_axe = pytest.mark.skipif(not AXE.is_file(), reason="no axe-core: `make axe` installs it")
WCAG_2_2_AA = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
PATIENCE = 60  # seconds to wait for a response on a busy machine


class Browser:
    """A browser tab.

    Attributes:
        requests: URLs requested since the page was opened.
        complaints: errors and exceptions on the console.
    """

    def __init__(self, folder):
        to_browser, self.commands = os.pipe()
        self.answers, from_browser = os.pipe()
        arguments = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "about:blank"]
        arguments += ["--remote-debugging-pipe", f"--user-data-dir={folder}"]
        pipes = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(
            ["bash", "-c", pipes, "bash", *arguments],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        os.close(self.commands)
        os.close(self.answers)
        self.process.terminate()
        self.process.wait(timeout=PATIENCE)

    def call(self, method, **parameters):
        """Sends a DevTools command and returns its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        answer = self.read_until(lambda message: message.get("id") == self.number)
        assert "error" not in answer, answer
        return answer["result"]

    def read_until(self, wanted):
        """Adds messages to `events` until `wanted(message)` is true, and returns that one."""
        end = time.monotonic() + PATIENCE
        while True:
            while b"\0" not in self.buffer:
                ready = select.select([self.answers], [], [], max(0, end - time.monotonic()))[0]
                assert ready, "Chromium did not answer"
                self.buffer += os.read(self.answers, 1 << 20)
            text, _, self.buffer = self.buffer.partition(b"\0")
            message = json.loads(text)
            self.events.append(message)
            if wanted(message):
                return message

    def open(self, address, width=1280, height=900, dark=False):
        self.events = []
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.resize(width, height)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.read_until(lambda message: message.get("method") == "Page.loadEventFired")
        scheme = address.partition(":")[0]
        while self.evaluate("document.readyState + location.protocol") != f"complete{scheme}:":
            pass

    def resize(self, width, height):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    @property
    def requests(self):
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    @property
    def complaints(self):
        errors = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.events if event.get("method") in errors]

    def evaluate(self, expression):
        """Returns the value of a JavaScript expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self, name):
        return self.evaluate(f"document.getElementById('{name}').textContent")

    def point(self, selector, across=0.5, down=0.5, press=True):
        """Moves the pointer to a relative position in an element, and clicks if `press`."""
        box = self.evaluate(
            f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect().toJSON()))"
            f"(document.querySelector({selector!r}))"
        )
        x, y = box["x"] + across * box["width"], box["y"] + down * box["height"]
        kinds = ("mouseMoved", "mousePressed", "mouseReleased")[: 3 if press else 1]
        for kind in kinds:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, *keys):
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def picture(self):
        """Returns a screenshot of the page as PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])


def accessibility_violations(browser):
    """Returns the violations of WCAG 2.2 AA that axe-core finds, as (rule, HTML element)."""
    browser.evaluate(AXE.read_text(encoding="utf-8") + "; 0")
    count, found = browser.evaluate(
        f"axe.run(document, {{runOnly: {json.dumps(WCAG_2_2_AA)}}}).then(found => [found.passes"
        ".length, found.violations.flatMap(v => v.nodes.map(node => [v.id, node.html]))])"
    )
    assert count > 5  # passed rules
    return found
