"""tools.page: what its server answers and refuses, and the page itself in a headless browser."""

import base64
import http.client
import io
import json
import os
import select
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from common import ROOT, call, errors
from PIL import Image

from model import VLM
from sample import open_asked
from support.chat import Chat
from tools import page as tools_page
from tools.page import BUSY, ENDED, NO_PICTURE, TOO_LARGE, Page, PageConfig

CHROMIUM = shutil.which("chromium")


@pytest.fixture
def page(tiny, monkeypatch, tmp_path):
    """The page of a tiny model, being served; page.looked_at counts the tiles that its tower has seen."""
    monkeypatch.chdir(tmp_path)
    cfg = PageConfig(model=str(tiny), device="cpu", max_new_tokens=12)
    vlm, tok = open_asked(cfg)
    page = Page(Chat(vlm, tok, cfg), port=0)
    page.looked_at = []
    vlm.vision.register_forward_hook(lambda tower, pixels, features: page.looked_at.append(len(pixels[0])))
    threading.Thread(target=page.serve_forever, daemon=True).start()
    yield page
    page.shutdown()
    page.server_close()
    assert not list(tmp_path.iterdir())                  # nothing was written


def send(page, path, body, **headers):
    """-> the response, to be read"""
    connection = http.client.HTTPConnection(page.host)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, content, {"Origin": f"http://{page.host}"} | headers)
    return connection.getresponse()


def post(page, path, body):
    """-> the lines"""
    return [json.loads(line) for line in send(page, path, body)]


def ask(page, chat, question):
    """-> the answer's text, [its number], [notes]"""
    lines = post(page, "/ask", {"chat": chat, "question": question})
    text = "".join(line.get("text", "") for line in lines)
    numbers = [line["answer"] for line in lines if "answer" in line]
    return text, numbers, [line["note"] for line in lines if "note" in line]


@pytest.fixture(scope="module")
def cat():
    return (ROOT / "cat.jpg").read_bytes()


# ---- over HTTP ----


def test_a_picture_two_questions_and_a_look_at_each_word_cost_one_run_of_the_tower(page, cat):
    assert post(page, "/picture", cat) == [{"chat": page.chat_id}]
    for number in 0, 1:
        text, numbers, _ = ask(page, page.chat_id, "What is it?")
        assert numbers == [number]
        for word in range(len(text.split())):
            [line] = post(page, "/look", {"chat": page.chat_id, "answer": number, "word": word})
            assert Image.open(io.BytesIO(base64.b64decode(line["png"]))).size == (240, 240)
    assert page.looked_at == [1]
    assert [role for role, _ in page.chat.turns] == ["human", "gpt", "human", "gpt"]


def test_the_answer_comes_while_it_is_written(page, cat, monkeypatch):
    goes_on = threading.Event()
    original = VLM.stream

    def stream(self, **given):
        for step, new in enumerate(original(self, **given)):
            assert step < 3 or goes_on.wait(30)
            yield new

    monkeypatch.setattr(VLM, "stream", stream)
    post(page, "/picture", cat)
    response = send(page, "/ask", {"chat": page.chat_id, "question": "What?"})
    assert "text" in json.loads(response.readline())     # and the answer is not yet written
    assert ask(page, page.chat_id, "And?") == ("", [], [BUSY])
    goes_on.set()
    assert b'"answer": 0' in response.read()


def test_a_file_that_is_no_picture_and_one_too_large_are_refused_in_a_sentence(page, cat):
    assert post(page, "/picture", b"some text") == [{"note": NO_PICTURE}]
    connection = http.client.HTTPConnection(page.host)
    connection.putrequest("POST", "/picture")
    connection.putheader("Origin", f"http://{page.host}")
    connection.putheader("Content-Length", str(50_000_000))
    connection.endheaders()
    response = connection.getresponse()                  # before any of it was sent
    assert json.loads(response.read())["note"] == TOO_LARGE
    assert page.looked_at == []


def test_a_question_too_long_is_refused_in_a_sentence_and_the_chat_goes_on(page, cat):
    post(page, "/picture", cat)
    [note] = ask(page, page.chat_id, "many words " * 400)[2]
    assert "leaves no room for an answer" in note
    assert ask(page, page.chat_id, "What?")[1] == [0]


def test_a_picture_in_another_tab_ends_the_chat_of_the_first(page, cat):
    [first] = post(page, "/picture", cat)
    ask(page, first["chat"], "What?")
    [second] = post(page, "/picture", cat)
    assert ask(page, first["chat"], "What?") == ("", [], [ENDED])
    assert post(page, "/look", first | {"answer": 0, "word": 0}) == [{"note": ENDED}]
    assert ask(page, second["chat"], "What?")[1] == [0]


def test_a_tab_of_a_server_that_is_gone_holds_no_chat_of_the_next(page, cat):
    post(page, "/picture", cat)
    with Page(page.chat, 0) as restarted:
        assert restarted.chat_id != page.chat_id


def test_other_hosts_and_origins_are_refused(page, cat):
    for headers in (
        {"Origin": "http://elsewhere.example"},
        {"Origin": "null"},
        {"Host": f"elsewhere.example:{page.server_port}"},
        {"Host": f"elsewhere.example:{page.server_port}", "Origin": "http://elsewhere.example"},
    ):
        assert send(page, "/picture", cat, **headers).status == 403
    connection = http.client.HTTPConnection(page.host)
    connection.request("GET", "/", headers={"Host": "elsewhere.example"})
    assert connection.getresponse().status == 403
    assert page.socket.getsockname()[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_said_in_a_line(page, tiny, capfd):
    assert call(tools_page.main, "--model", tiny, "--port", page.server_port) == 1
    assert f"--port {page.server_port}: Address already in use; give another" in errors(capfd)[-1]


def test_the_page_asks_nothing_of_the_network():
    html = tools_page.HTML.read_text()
    assert "default-src 'none'" in html
    assert "http" not in html.replace("http-equiv", "")


# ---- in a browser ----


class Browser:
    """Chromium's DevTools protocol over two pipes: messages of JSON that end in a NUL."""

    def __init__(self, folder, width):
        to_read, self.to = os.pipe()
        self.back, to_write = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={folder}", f"--window-size={width},900", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}', CHROMIUM, *flags],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.waiting = b""
        self.n_sent = 0
        self.width = width

    def call(self, method, session=None, **params):
        self.n_sent += 1
        message = {"id": self.n_sent, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.waiting:
                assert select.select([self.back], [], [], 60)[0], f"no answer to {method}"
                self.waiting += os.read(self.back, 1 << 16)
            line, _, self.waiting = self.waiting.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.n_sent:
                assert "error" not in answer, answer
                return answer["result"]

    def close(self):
        self.call("Browser.close")
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)


class Tab:
    def __init__(self, browser, url):
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Emulation.setDeviceMetricsOverride", width=browser.width, height=900, deviceScaleFactor=1,
                  mobile=False)
        self.call("Page.navigate", url=url)
        self.until("document.readyState == 'complete' && !!document.querySelector('form')")

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def run(self, code):
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, code):
        end = time.time() + 40
        while not self.run(code):
            assert time.time() < end, (code, self.run("document.body.innerText"))
            time.sleep(0.05)

    def give(self, data, way, name="cat.jpg"):
        """Drop, paste or choose a file with these bytes, or one of that many."""
        made = data
        if isinstance(data, bytes):
            made = f"Uint8Array.from(atob('{base64.b64encode(data).decode()}'), (c) => c.charCodeAt(0))"
        self.run(f"""(() => {{
            const files = new DataTransfer();
            files.items.add(new File([{made}], "{name}"));
            if ("{way}" == "drop")
                document.body.dispatchEvent(new DragEvent("drop", {{dataTransfer: files, bubbles: true}}));
            if ("{way}" == "paste")
                document.body.dispatchEvent(
                    new ClipboardEvent("paste", {{clipboardData: files, bubbles: true}}));
            if ("{way}" == "choose") {{
                find("[type=file]").files = files.files;
                find("[type=file]").dispatchEvent(new Event("change"));
            }}
        }})()""")

    def ask(self, question):
        """By keyboard, up to the end of the answer -> its text."""
        self.until("!find('#question').disabled")
        self.run("find('#question').focus()")
        self.call("Input.insertText", text=question)
        for kind in "keyDown", "keyUp":
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                      windowsVirtualKeyCode=13)
        answered = "find('#question').value == '' && !find('#question').disabled"
        self.until(f"{answered} || find('#note').textContent")
        return self.run("find('#talk p:last-child span')?.textContent")

    def click(self, selector):
        x, y = self.run(f"""(() => {{
            const element = document.querySelector("{selector}");
            element.scrollIntoView({{block: "center"}});
            const box = element.getClientRects()[0];
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in "mousePressed", "mouseReleased":
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def note(self):
        self.until("find('#note').textContent")
        return self.run("find('#note').textContent")

    def screenshot(self, name):
        """Where PLAINVLM_SCREENSHOTS names a folder, somebody wants to look."""
        if folder := os.environ.get("PLAINVLM_SCREENSHOTS"):
            png = self.call("Page.captureScreenshot", format="png")["data"]
            (Path(folder) / f"{name}-{self.browser.width}.png").write_bytes(base64.b64decode(png))


@pytest.fixture
def browser(request, tmp_path_factory):
    """As wide as the test says, else as a telephone."""
    if CHROMIUM is None:
        pytest.skip("no chromium here; Debian's package of that name has it")
    browser = Browser(tmp_path_factory.mktemp("chromium"), getattr(request, "param", 400))
    yield browser
    browser.close()


@pytest.mark.parametrize("browser", [400, 1400], indirect=True)
def test_in_a_browser_one_drops_a_picture_asks_clicks_words_and_goes_on(browser, page, cat):
    tab = Tab(browser, f"http://{page.host}/")
    tab.screenshot("1-empty")
    assert tab.run("find('#question').disabled")
    tab.give(cat, "drop")
    tab.until("find('img').naturalWidth")
    tab.screenshot("2-picture")
    first = tab.ask("What is it?")
    assert first == page.chat.turns[1][1]
    before = tab.run("find('img').src")
    tab.click("#talk button:last-of-type")
    tab.until(f"find('img').src != '{before}' && find('img').naturalWidth == 240")
    assert first.split()[-1] in tab.run("find('label').textContent")
    tab.screenshot("3-word")
    assert tab.ask("And what else?") == page.chat.turns[3][1]
    tab.screenshot("4-second-turn")
    assert page.looked_at == [1]
    assert tab.run("document.documentElement.scrollWidth") <= browser.width   # nothing sticks out


def test_in_a_browser_the_answer_grows_while_it_is_written(browser, page, cat, monkeypatch):
    goes_on = threading.Event()
    original = VLM.stream

    def stream(self, **given):
        for step, new in enumerate(original(self, **given)):
            assert step < 5 or goes_on.wait(40)
            yield new

    monkeypatch.setattr(VLM, "stream", stream)
    tab = Tab(browser, f"http://{page.host}/")
    tab.give(cat, "choose")
    tab.until("!find('#question').disabled")
    tab.run("find('#question').value = 'What?'; find('form').requestSubmit()")
    tab.until("find('#talk span')?.textContent")
    tab.screenshot("5-streaming")
    assert tab.run("find('#question').disabled")
    goes_on.set()
    tab.until("!find('#question').disabled")


def test_in_a_browser_what_is_refused_is_said_in_a_sentence(browser, page, cat):
    tab = Tab(browser, f"http://{page.host}/")
    tab.give(b"some text", "drop", "notes.txt")
    assert tab.note() == NO_PICTURE
    tab.screenshot("6-no-picture")
    tab.give("new Uint8Array(50e6)", "drop", "large.png")
    tab.until(f"find('#note').textContent == '{TOO_LARGE}'")
    tab.give(cat, "paste")
    tab.until("find('img').naturalWidth")
    tab.ask("many words " * 400)
    assert "leaves no room for an answer" in tab.note()
    tab.screenshot("7-too-long")

    second = Tab(browser, f"http://{page.host}/")
    second.give(cat, "drop")
    assert second.ask("What?")
    tab.ask("What?")
    tab.until(f"find('#note').textContent == '{ENDED}'")
    tab.screenshot("8-second-tab")


def test_in_a_browser_a_page_of_another_origin_gets_nothing(browser, page, cat):
    elsewhere = Tab(browser, f"http://{page.host}/")
    elsewhere.call("Page.navigate", url="data:text/html,<form></form>")
    elsewhere.until("location.protocol == 'data:' && document.readyState == 'complete'")
    sent = f"fetch('http://{page.host}/picture', {{method: 'POST', body: 'x'}})"
    assert elsewhere.run(f"{sent}.then(() => 'read', () => 'refused')") == "refused"
    assert page.chat_id is None
