"""Every view in a second engine: Debian's firefox-esr, without a window, by Marionette, the protocol of its own."""

import json
import shutil
import socket
import subprocess
import time

import pytest
from small import small_checkpoint

import export

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
PATIENCE = 120  # seconds
MESSAGES = """window.messages = [];
addEventListener("error", (event) => messages.push(event.message));
addEventListener("unhandledrejection", (event) => messages.push(String(event.reason)));"""
# Whether the canvases of these ids show more than one colour.
DRAWN = """return arguments[0].every((id) => {
    const canvas = document.getElementById(id);
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size > 1;
});"""
CANVASES = dict(make=["make-x", "make-x0"], sketch=["pad", "sketch-x", "sketch-x0"],
                compare=["end-a", "between", "end-b"], inside=["inside-x", "channels"])


class Firefox:
    """A Firefox of its own with an empty profile. A message is its length, a colon, and JSON."""

    def __init__(self, profile):
        (profile / "user.js").write_text('user_pref("marionette.port", 0);')
        self.process = subprocess.Popen([FIREFOX, "--headless", "--marionette", "--profile", profile],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self.connect(profile / "MarionetteActivePort")
        except BaseException:
            self.process.kill()
            raise

    def connect(self, port):
        wait(lambda: port.exists() and port.read_text())
        self.socket = socket.create_connection(("127.0.0.1", int(port.read_text())), timeout=PATIENCE)
        self.answers = self.socket.makefile("rb")
        self.receive()
        self.ask("WebDriver:NewSession")

    def receive(self):
        length = b""
        while (character := self.answers.read(1)) != b":":
            assert character, "Firefox has ended"
            length += character
        return json.loads(self.answers.read(int(length)))

    def ask(self, command, **parameters):
        message = json.dumps([0, 1, command, parameters]).encode()
        self.socket.sendall(b"%d:%s" % (len(message), message))
        _, _, error, result = self.receive()
        assert error is None, error
        return result

    def run(self, script, *arguments):
        return self.ask("WebDriver:ExecuteScript", script=script, args=arguments)["value"]

    def close(self):
        self.process.terminate()
        self.process.wait(PATIENCE)
        self.socket.close()


def wait(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def firefox(tmp_path_factory):
    if FIREFOX is None:
        pytest.skip("Firefox is missing: apt-get install firefox-esr, or another way to install it")
    firefox = Firefox(tmp_path_factory.mktemp("profile"))
    yield firefox
    firefox.close()


def test_every_view_works_in_firefox(firefox, tmp_path):
    path = small_checkpoint(tmp_path / "model.pt", conditional=True)
    assert export.main(["--checkpoint", str(path)]) == 0
    firefox.ask("WebDriver:Navigate", url=f"{(tmp_path / 'page.html').as_uri()}#steps=2&label=3")
    firefox.run(MESSAGES)
    text = "return document.getElementById(arguments[0]).textContent"
    wait(lambda: firefox.run(text, "told").startswith("Made the 3 in 2 steps"))
    for view, canvases in CANVASES.items():
        firefox.run("document.getElementById(arguments[0]).click()", f"tab-{view}")
        wait(lambda canvases=canvases: firefox.run(DRAWN, canvases))
    firefox.run("document.getElementById('complete').click()")
    wait(lambda: firefox.run(text, "complete-told").startswith("Four proposals"))
    assert firefox.run("return window.messages") == [] and firefox.run(text, "problem") == ""
