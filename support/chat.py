"""A chat: questions about pictures, each asked with all turns before it. On a terminal, or from a pipe:

    /image FILE     another picture, for the next question
    /reset          forget all turns and pictures
    /save FILE      write the chat as a record that trains (LLaVA's JSON)

An empty line or Ctrl-D ends it, and so does Ctrl-C; while an answer is written, that stops the answer.
"""

import contextlib
import sys

from conversation import as_text, put_in_front
from model import PRESETS
from sample import DESCRIBE, Answer, cut_picture, encode_question, stream_answer
from support.attention import Look
from support.cache import KVHistory
from support.cli import UserError
from support.io import write_json
from support.picture_files import open_image
from support.trace import Trace


class Chat:
    trace = None  # a Trace, where --trace asks for it
    answer = None  # the last one

    def __init__(self, vlm, tok, cfg):
        self.vlm = vlm
        self.tok = tok
        self.cfg = cfg  # an AskConfig
        self.reset()

    def reset(self):
        self.files = []  # their names
        self.pictures = []  # (tiles, layout) of each
        self.turns = []  # ("human", text), ("gpt", text), ...
        self.history = KVHistory()

    def show(self, files, images):
        """Pictures for the next question."""
        n_picture = len(self.pictures) + len(images)
        for file, image in zip(files, images):
            picture = cut_picture(self.vlm, image, n_picture)
            self.files.append(file)
            self.pictures.append(picture)
            if self.trace:
                self.trace.tell_picture(file, image, *picture)

    @property
    def n_asked(self):
        """How many of the pictures stand in a turn."""
        return sum(text.count("<image>") for _, text in self.turns)

    def ask(self, question):
        """Yield the answer piece by piece, while it is written. New pictures stand in front of the question,
        unless it says where.

        self.answer is what has been written. It becomes a turn even if the caller stops on the way.
        """
        n_new = len(self.pictures) - self.n_asked
        [(_, question)] = put_in_front([("human", question)], n_new)
        self.prompt = encode_question(self.vlm, self.tok, question, self.pictures, self.turns)
        self.answer = Answer("", False, [])
        if self.trace:
            self.trace.begin()
        n_shown = 0
        try:
            for answer in stream_answer(self.vlm, self.tok, self.prompt, self.cfg, self.history):
                self.answer = answer
                yield answer.text[n_shown:]
                n_shown = len(answer.text)
        finally:
            if not self.answer.ids:  # stopped while the prompt was read
                self.history.x = None
            if self.answer.text:  # an empty answer is no turn to go on from
                self.turns += [("human", question), ("gpt", as_text(self.answer.text))]

    @property
    def remark(self):
        """What is to be said of the last answer."""
        n_token = len(self.answer.ids)
        if self.answer.whole:
            return "" if self.answer.text else "the model gave an empty answer"
        limit = f"with the prompt these are all {self.vlm.cfg.decoder.block_size} the model takes"
        if n_token == self.cfg.max_new_tokens:
            limit = "raise --max-new-tokens"
        return f"cut off after {n_token} tokens; {limit}"


# ---- on a terminal ----


def talk(chat, images):
    if chat.cfg.trace:
        chat.trace = Trace(chat)
    chat.show(chat.cfg.image, images)
    for question in read_questions(chat):
        print_answer(chat, question)
        if chat.cfg.attention and chat.pictures and chat.answer.text:
            Look(chat).save(chat.cfg.attention)
            print(f"where it looked is drawn in {chat.cfg.attention}", file=sys.stderr)
    if chat.answer is None and not on_terminal():
        raise UserError("nothing was asked: give --prompt, or questions on standard input")
    return 0


def read_questions(chat):
    """--prompt; without it a caption is asked for, where there are pictures, and then each line that is typed
    or piped, up to an empty one. A model of the preset photo learned from no captions: it is asked for none.
    """
    prompt = chat.cfg.prompt
    if prompt:
        yield prompt if chat.pictures else as_text(prompt)
        return
    if chat.pictures and chat.vlm.cfg.vision != PRESETS["photo"].vision:
        print(f"> {DESCRIBE}")
        yield DESCRIBE
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # for the arrow keys

        readline.parse_and_bind("set enable-bracketed-paste off")
    try:
        while sys.stdin and (line := input("\n> " if on_terminal() else "").strip()):
            if line.startswith("/"):
                obey(chat, line)
            else:
                yield as_text(line)
    except (EOFError, KeyboardInterrupt):
        if on_terminal():
            print()
    except UnicodeDecodeError:
        raise UserError("the questions on standard input are not UTF-8 text") from None


def on_terminal():
    return sys.stdin and sys.stdin.isatty()


def obey(chat, line):
    try:
        match line.split(maxsplit=1):
            case ["/reset"]:
                chat.reset()
                print("all turns and pictures are forgotten")
            case ["/image", file]:
                chat.show([file], [open_image(file)])
                print(f"{file} is shown with the next question")
            case ["/save", file]:
                turns = [{"from": role, "value": text} for role, text in chat.turns]
                images = chat.files[: chat.n_asked]
                write_json(file, [{"id": "chat", "image": images, "conversations": turns}])
                print(f"the chat is in {file}; for training, --image-root is this folder")
            case _:
                raise UserError(f"{line} is no command; there are /image FILE, /reset, /save FILE")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)


def print_answer(chat, question):
    try:
        with contextlib.closing(chat.ask(question)) as pieces:
            for piece in pieces:
                if not chat.trace:  # its lines would stand between the pieces
                    print(piece, end="", flush=True)
        remark = chat.remark
    except (KeyboardInterrupt, UserError) as error:
        if chat.cfg.prompt or not on_terminal():
            raise
        remark = str(error) or "stopped"
    print(chat.answer.text if chat.trace else "")
    if remark:
        print(f"[{remark}]", file=sys.stderr)
