"""A page on this machine to ask a model about a picture, and to see where it looked.

    python -m tools.page                     # then open the address that it prints

There is one chat: a picture begins it, in whatever tab. Only this page is answered; a request that names
another host, or comes from a page of another origin, is refused. Nothing is written to disk. What
tools/page.html sends, and gets as lines of JSON; instead of them, or at their end, {"note": a sentence}:

    POST /picture  the bytes of a file      {"chat": its id}
    POST /ask      {chat, question}         {"text": a piece of the answer}, ..., {"answer": its number}
    POST /look     {chat, answer, word}     {"png": where the decoder looked for that word, in base 64}
"""

import base64
import io
import json
import secrets
import sys
import threading
from contextlib import closing, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from conversation import as_text
from sample import open_asked
from support.attention import Look
from support.chat import Chat
from support.cli import UserError, arg, parse, run_program
from support.flags import AskConfig
from support.picture_files import FORMATS, open_image

HTML = Path(__file__).with_name("page.html")
MAX_BYTES = 20_000_000
TOO_LARGE = "this has more than 20 MB; give a smaller picture"
NO_PICTURE = f"this is no picture that can be read; give one of {', '.join(FORMATS)}"
BUSY = "the model is still answering, perhaps in another tab; wait until it has ended"
ENDED = "this chat has ended, since a picture was given in another tab; give one here to begin anew"


@dataclass
class PageConfig(AskConfig):
    port: int = arg(8000, "of the address; 0: any that is free", at_least=0, below=65536)


class Page(ThreadingHTTPServer):
    def __init__(self, chat, port):
        super().__init__(("127.0.0.1", port), Handler)
        self.host = f"127.0.0.1:{self.server_port}"
        self.chat = chat
        self.chat_id = None          # of the chat that goes on; of an earlier server's tabs none is like it
        self.looks = []              # a Look for each of its answers
        self.model = threading.Lock()  # held by the request that uses it


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.headers["Host"] != self.server.host or self.path != "/":
            return self.send_error(403)
        self.start("text/html; charset=utf-8")
        self.wfile.write(HTML.read_bytes())

    def do_POST(self):
        host = self.server.host
        if (self.headers["Host"], self.headers["Origin"]) != (host, f"http://{host}"):
            return self.send_error(403)
        self.start("application/x-ndjson")
        with suppress(ConnectionError):  # the tab was closed
            try:
                self.work()
            except UserError as error:
                self.tell(note=str(error))
            except RuntimeError as error:  # of PyTorch, such as a lack of memory
                self.tell(note=f"the model failed: {error}")

    def work(self):
        length = int(self.headers["Content-Length"])
        if length > MAX_BYTES:
            raise UserError(TOO_LARGE)
        data = self.rfile.read(length)
        if not self.server.model.acquire(blocking=False):
            raise UserError(BUSY)
        try:
            if self.path == "/picture":
                return self.begin(data)
            asked = json.loads(data)
            if asked["chat"] != self.server.chat_id:
                raise UserError(ENDED)
            if self.path == "/ask":
                self.ask(asked["question"])
            else:
                self.look(asked["answer"], asked["word"])
        finally:
            self.server.model.release()

    def begin(self, data):
        try:
            image = open_image(data)
        except UserError:
            raise UserError(NO_PICTURE) from None
        page = self.server
        page.chat_id = secrets.token_hex(8)
        page.looks = []
        page.chat.reset()
        page.chat.show(["the picture"], [image])
        self.tell(chat=page.chat_id)

    def ask(self, question):
        chat, looks = self.server.chat, self.server.looks
        with closing(chat.ask(as_text(question))) as pieces:
            for piece in pieces:
                self.tell(text=piece)
        if chat.answer.text:
            looks.append(Look(chat))
            self.tell(answer=len(looks) - 1)
        if chat.remark:
            self.tell(note=chat.remark)

    def look(self, answer, word):
        png = io.BytesIO()
        self.server.looks[answer].draw(word).save(png, "PNG")
        self.tell(png=base64.b64encode(png.getvalue()).decode())

    def start(self, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def tell(self, **line):
        self.wfile.write(json.dumps(line).encode() + b"\n")

    def log_message(self, *words):
        pass


def main(argv=None):
    cfg = parse(PageConfig, argv, __doc__)
    vlm, tok = open_asked(cfg)
    try:
        page = Page(Chat(vlm, tok, cfg), cfg.port)
    except OSError as error:
        raise UserError(f"--port {cfg.port}: {error.strerror}; give another, or 0 for any") from None
    print(f"http://{page.host}  (Ctrl-C ends it)")
    page.serve_forever()


if __name__ == "__main__":
    sys.exit(run_program(main))
