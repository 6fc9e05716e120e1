"""Conversations to tokens and labels: prompts, templates, tokenizer.

    [("human", "<image>\\nWhat is this?"), ("gpt", "A cat.")]
      --template-->    "... USER: <image>\\nWhat is this? ASSISTANT:« A cat.</s>»"   « » around the supervised
      --tokenizer-->   tokens (T,), in which a picture is a run of image-token ids, one a visual token
                       labels (T,): under each token its own id where it is supervised, IGNORE elsewhere
A position is marked when its text is appended: nothing is tokenised twice, compared or guessed afterwards.

Where this departs from the code of LLaVA (arXiv:2310.03744), Prismatic (arXiv:2402.07865) and InternVL
(arXiv:2411.10442):
  - Where a LLaVA question ends in its only picture, "question\\n<image>", the <image> is moved to the front.
    The original does so wherever it stands, and makes one of several; here they stay as they were written.
  - "</s>", "<|im_end|>" or "<IMG_CONTEXT>" typed by a user stays text. The originals turn it into the
    control token. ("###", which parts the turns of llava_v0, is no control token: a user who types it
    ends his turn, as there.)
  - llava_v0 is trained as it is asked. The original trained on
    "\\n\\n### Human: q\\n### Assistant: a\\n### ", and supervised the first ### of it, too.
  - After </s> comes "USER" without a leading space, one id in Llama's vocabulary, which is what
    `legacy=false` in the public tokenizer configs means today. The weights were probably trained with a
    version that split it in two. Folders that say `legacy: true` are read the same way.
"""

import difflib
import re
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from model import IGNORE
from support.cli import UserError
from support.configs import prismatic_llm
from support.io import read_json, reading

CONTROL = r"(</?s>|<\|im_start\|>|<\|im_end\|>|<image>|[«»])"  # what is special in a template
NOWHERE = "((?!))"                   # a pattern that matches nowhere
TYPED = "<\0image>"                  # an <image> that is a word. Nobody can type a NUL

# ---- conversations ----


def encode_conversation(tok, turns, template_name, n_visual):
    """[("human", text), ("gpt", text), ...] -> tokens, labels (lists).

    n_visual: how many visual tokens each <image> becomes. A leading answer is dropped, as in the original,
    and so is a last question that has no answer: nothing of it is supervised.
    """
    if turns and turns[-1][0] == "human":
        turns = turns[:-1]
    return encode_turns(tok, turns, template_name, n_visual)


def encode_prompt(tok, turns, template_name, n_visual):
    """A conversation that ends in a question -> its tokens (a list), up to where the answer begins."""
    if not turns or turns[-1][0] != "human":
        raise UserError("a prompt must end with a human turn")
    tokens, _ = encode_turns(tok, turns, template_name, n_visual)
    return tokens


def as_text(text):
    """What a user or a model has written, where <image> is a word, for a conversation that has pictures."""
    return text.replace("<image>", TYPED)


def put_in_front(turns, n_image):
    """Begin the first question with an <image> for each picture, if no turn says where they stand."""
    if not n_image or any("<image>" in text for _, text in turns):
        return turns
    role, text = turns[0]
    return [(role, "<image>" * n_image + "\n" + text), *turns[1:]]


def arrange_turns(turns, template_name, n_image):
    """Check the turns, and bring every <image> to its place. Without pictures "<image>" is a word."""
    template = find_template(template_name)
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    if not turns:
        raise UserError("no answer to learn from; a human turn and a gpt turn after it are needed")
    for k, (role, text) in enumerate(turns):
        if role != ("human", "gpt")[k % 2]:
            raise UserError(f"turn {k + 1} is from {role!r}; turns must go human, gpt, human, gpt")
        if role == "gpt" and not text.strip():
            raise UserError(f"the answer in turn {k + 1} is empty; write it or drop the record")
        if role == "gpt" and "<image>" in text and n_image:
            raise UserError(f"the answer in turn {k + 1} holds <image>; pictures stand in questions")
    if len(turns) > 2 and template.human is None:
        raise UserError(f"template {template_name} takes one question and one answer, not {len(turns)} turns")
    if not template.keep_question and not n_image:
        raise UserError(f"template {template_name} needs a picture; use another --template for text alone")

    # One <image> for each picture. A single picture may come without.
    if n_image == 1:
        turns = put_in_front(turns, 1)
    n_marker = sum(text.count("<image>") for _, text in turns)
    if n_image and n_marker != n_image:
        raise UserError(f"{n_marker} <image> for {n_image} pictures; write one for each in the questions")
    return [(role, tidy_text(text, role, template, n_image)) for role, text in turns]


def tidy_text(text, role, template, n_image):
    """A turn's text as the original model's data code leaves it."""
    if role == "human" and not template.keep_question:
        return "<image>" * text.count("<image>")
    if "<image>" in template.first:
        text = text.replace("<image>", "")
    bare = text.strip()
    at_either_end = bare.startswith("<image>") or bare.endswith("\n<image>")
    if template.tidy == "image first" and n_image and text.count("<image>") == 1 and at_either_end:
        return ("<image>\n" + bare.replace("<image>", "").strip()).strip()
    return bare if template.tidy == "strip" else text


class Piece(NamedTuple):
    text: str
    special: bool     # a control token of the template, or an <image>
    supervised: bool


def split_turns(turns, template, n_image):
    """Cut a conversation into texts and the special tokens between them. -> [Piece]"""
    pieces = []
    supervised = False
    for k, (role, text) in enumerate(turns):
        if role == "gpt":
            frame = template.answer
        elif k > 0:
            frame = template.human
        else:
            frame = template.first.replace("<image>", "<image>" * n_image)
        before, after = frame.split("{}")

        # Control tokens come from the template alone. What a user types may hold pictures, nothing else.
        typed = "(<image>)" if n_image else NOWHERE
        for part, specials in (before, CONTROL), (text, typed), (after, CONTROL):
            for j, piece in enumerate(re.split(specials, part)):  # text, special, text, ..., special, text
                is_special = j % 2 == 1
                if is_special and piece in ("«", "»"):
                    supervised = piece == "«"
                elif is_special and piece == "<image>":
                    pieces += [Piece(token, True, supervised) for token in template.picture]
                elif piece:
                    pieces.append(Piece(piece, is_special, supervised))
    return pieces


def encode_turns(tok, turns, template_name, n_visual):
    """-> tokens, labels.

    Adjacent texts are encoded as one, so that no word is cut where they meet. A cut falls at control tokens,
    at pictures, and where supervision begins or ends, so a prompt's ids are the first ids of the training
    example. Before the space that opens an answer it changes nothing: "ASSISTANT:" and " A cat." have the ids
    of "ASSISTANT: A cat.", since a Llama piece has spaces only at its start.
    """
    template = find_template(template_name)
    tokens, labels = [tok.bos], [IGNORE]
    lengths = iter(n_visual)
    # Whether the next text gets sentencepiece's space: at the start, and after a picture of LLaVA.
    dummy_prefix = True
    turns = arrange_turns(turns, template_name, len(n_visual))
    pieces = split_turns(turns, template, len(n_visual))
    for (special, supervised), same in groupby(pieces, key=lambda piece: (piece.special, piece.supervised)):
        texts = [piece.text for piece in same]
        if not special:
            ids = tok.encode("".join(texts).replace(TYPED, "<image>"), dummy_prefix)
            dummy_prefix = False
        else:
            ids = []
            for text in texts:
                ids += [tok.image] * next(lengths) if text == "<image>" else [tok.control_id(text)]
            dummy_prefix = texts[-1] == "<image>"
        tokens += ids
        labels += ids if supervised else [IGNORE] * len(ids)
    return tokens, labels


# ---- templates ----


@dataclass(frozen=True)
class Template:
    """How turns become one text. "{}" is the turn's own text, and what stands between « and » is supervised.

    <s>, </s>, <|im_start|> and <|im_end|> are control tokens here and nowhere else. An <image> in `first` is
    the place of all pictures.
    """
    first: str                       # the first question and all that stands around it
    human: str | None                # each later question; None: there can be no later one
    answer: str
    stop: str = "</s>"               # what ends an answer: a token in < >, or a text (cut_at_stop)
    tidy: str = "image first"        # of a turn's text: a lone <image> to its front; or "strip", or "none"
    picture: tuple = ("<image>",)    # an <image> and the control tokens around it
    keep_question: bool = True       # False: of a question only its pictures stay
    captions: str = "plain"          # the template of this model's stage 1, which learns captions


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.")
HUMAN = VICUNA.replace("user", "human")
LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language.")
INTERNVL2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。")
INTERNVL2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。")
ASK = "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n"
ASK_LINES = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
INTERN = {"stop": "<|im_end|>", "picture": ("<img>", "<image>", "</img>")}
PRISM = {"tidy": "strip", "captions": "prism_plain"}

TEMPLATES = {
    # LLaVA-1.5 is vicuna_v1, its stage 1 plain. LLaVA-NeXT over Mistral is mistral_instruct.
    "vicuna_v1": Template(VICUNA + " USER: {} ASSISTANT:", "USER: {} ASSISTANT:", "« {}</s>»"),
    "llava_v1": Template(HUMAN + " USER: {} ASSISTANT:", "USER: {} ASSISTANT:", "« {}</s>»"),
    "llava_v0": Template(
        HUMAN + "###Human: {}«###Assistant:»", "Human: {}«###Assistant:»", "« {}###»", stop="###"),
    "llava_llama_2": Template(
        f"[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n{{}} [/INST]", "<s>[INST] {} [/INST]", "« {} </s>»"),
    "mistral_instruct": Template("[INST] {} [/INST]", "[INST] {} [/INST]", "« {} </s>»"),
    "plain": Template("{}", None, "«{}\n»", stop="\n", keep_question=False),

    # Prismatic encodes each turn by itself, with its own dummy prefix: that is the space before a later
    # question, a byte that its strings lack and its ids have. Its pictures come right after <s>; prism_plain
    # is its align stage. "<<SYS>" is its own misspelling, which its weights have learned.
    "prism_plain": Template("{}", None, "«{}</s>»", keep_question=False, **PRISM),
    "prism_pure": Template("<image>In: {}\nOut:", " In: {}\nOut:", "« {}</s>»", **PRISM),
    "prism_vicuna": Template(
        f"<image>{VICUNA} USER: {{}} ASSISTANT:", " USER: {} ASSISTANT:", "« {}</s>»", **PRISM),
    "prism_llama_2": Template(
        f"<image>[INST] <<SYS>\n{LLAMA_2}\n<</SYS>>\n\n{{}} [/INST]", " [INST] {} [/INST]", "« {}</s>»",
        **PRISM),
    "prism_mistral": Template("<image>[INST] {} [/INST]", " [INST] {} [/INST]", "« {}</s>»", **PRISM),

    # InternVL-2 and InternVL-2.5.
    "internlm2-chat": Template(
        f"<|im_start|>system\n{INTERNVL2}<|im_end|>{ASK}", ASK, "«{}<|im_end|>»", tidy="strip", **INTERN),
    "internvl2_5": Template(
        f"<|im_start|>system\n{INTERNVL2_5}<|im_end|>\n{ASK_LINES}", ASK_LINES, "«{}<|im_end|>»\n",
        tidy="none", **INTERN),
}


def find_template(name):
    name = str(name)  # a config.json may hold anything
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.0)
        known = ", ".join(TEMPLATES)
        raise UserError(f"template {name!r} is unknown; did you mean {near[0]!r}? Known are {known}")
    return TEMPLATES[name]


def stop_ids(tok, template_name):
    """Ids that end an answer: </s>, and the template's own if that is a token."""
    stop = find_template(template_name).stop
    is_token = stop.startswith("<") and stop != "</s>"
    return [tok.eos, tok.control_id(stop)] if is_token else [tok.eos]


def cut_at_stop(text, template_name, partial=False):
    """The answer in a text, where the stop is no id but a text, ### or a newline.

    `partial`: more is to come, so what may be the beginning of the stop is held back.
    """
    stop = find_template(template_name).stop
    if stop.startswith("<"):
        return text
    text, found, _ = text.partition(stop)
    return text.rstrip(stop[0]) if partial and not found else text  # both are runs of one character


# ---- tokenizer ----


class Tokenizer:
    """A sentencepiece model, and its control tokens {string: id}, which never come from a text.

    `image` stands for one visual token, and `pad` fills up a batch. Where no file names them they take the
    next free ids, 32000 and 32001 in Llama as in llava-hf. Prismatic adds <PAD> as 32000 and has no token
    for a picture: that is 32001 then, a row that it never uses.
    """

    def __init__(self, path):
        path = Path(path)
        self.path = path / "tokenizer.model" if path.is_dir() else path
        self.read_model()
        self.control = self.control_tokens(self.path.parent)
        self.number_tokens()
        self.seams = self.find_seams()

    def read_model(self):
        """The sentencepiece model, with and without the space that it puts before a text."""
        if not self.path.exists():
            raise UserError(
                f"{self.path}: no tokenizer there; copy the language model's tokenizer.model. Families that "
                "have none, such as Llama-3 and Qwen, are not supported")
        with reading(self.path, "copy the sentencepiece model again"):
            raw = self.path.read_bytes() or b"empty"
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
            # Of two protobufs written one after the other the later wins: this one says normalizer_spec
            # (field 3) { add_dummy_prefix (field 3): false }.
            self.bare = sentencepiece.SentencePieceProcessor(model_proto=raw + b"\x1a\x02\x18\x00")
            self.n_text = self.processor.vocab_size()
            self.bare.decode(list(range(self.n_text)))  # a damaged piece is said here, not in an answer
        self.bos = self.processor.bos_id()
        self.eos = self.processor.eos_id()
        if min(self.bos, self.eos) < 0:
            raise UserError(f"{self.path}: has no <s> or no </s>; train it with both, as Llama's has")
        if self.bare.decode(self.bare.encode("a  b\n")) != "a  b\n":  # the texts of a prompt would not add up
            raise UserError(
                f"{self.path}: does not keep spaces and newlines; train it as Llama's was: "
                "normalization_rule_name='identity', remove_extra_whitespaces=False, byte_fallback=True")
        puts_space = self.processor.encode("a") != self.bare.encode("a")  # InternLM2 does not
        self.prefix = " " if puts_space else ""

    def number_tokens(self):
        """The ids of <image> and <pad>, and how many ids there are. InternLM2 pads with </s>."""
        known = self.control
        free = count(max(self.n_text, max(known.values()) + 1))
        self.image = known.get("<IMG_CONTEXT>", known.get("<image>"))
        if self.image is None:
            self.image = next(free)
        self.pad = self.eos if "<|im_end|>" in known else known.get("<pad>", known.get("<PAD>"))
        if self.pad is None:
            self.pad = next(free)
        self.names = {self.image: "<image>", self.pad: "<pad>"} | {i: name for name, i in known.items()}

        # Every id is below n_id. vocab_size: rows of a new embedding, 32064 for Llama, 92553 for InternVL.
        self.n_id = max(self.n_text, max(self.names) + 1)
        self.vocab_size = self.n_id if "<IMG_CONTEXT>" in known else -(-self.n_id // 64) * 64

    def control_tokens(self, folder):
        """{string: id} of <s>, </s>, InternLM2's placeholder pieces, and what the files beside it declare."""
        found = {"<s>": self.bos, "</s>": self.eos}
        placeholders = [self.processor.piece_to_id(f"[UNUSED_TOKEN_{i}]") for i in range(141, 147)]
        if placeholders[-1] != self.processor.unk_id():
            found |= zip(INTERNLM2_CONTROL, placeholders)
            found |= zip(INTERNVL_CONTROL, count(self.n_text))
        if prismatic_llm(read_json(folder / "config.json", {})):
            found["<PAD>"] = self.n_text

        added = read_json(folder / "added_tokens.json", {})
        declared = read_json(folder / "tokenizer_config.json", {})
        with reading(f"{folder}: added_tokens.json or tokenizer_config.json", "copy both again"):
            found |= {name: int(i) for name, i in added.items()}
            for i, token in declared.get("added_tokens_decoder", {}).items():
                if token.get("special") or int(i) >= self.n_text:
                    found[token["content"]] = int(i)
            if min(found.values()) < 0 or max(found.values()) > self.n_text + 10_000:
                raise UserError(f"ids of tokens are to be 0 to {self.n_text + 10_000:,}; copy both again")
        return found

    def find_seams(self):
        """A pattern of the places where encode cuts a text in two, behind the first letter of such a piece:

        InternLM2's control tokens are pieces like others: "[UNUSED_TOKEN_145]" in a text would become one.
        """
        pieces = [self.processor.id_to_piece(i) for i in self.names if i < self.n_text]
        pieces = [p for p in pieces if self.bare.encode(p) == [self.processor.piece_to_id(p)]]
        seams = [f"(?<={re.escape(p[0])})(?={re.escape(p[1:])})" for p in pieces]
        return re.compile("|".join(seams) or NOWHERE)

    def encode(self, text, dummy_prefix=True):
        """Ids of a text, without <s> and </s>, and never a control token whatever the text says.

        dummy_prefix: put a space before it, as sentencepiece does, which is wanted at the start alone.
        """
        with reading(f"the text {text[:40]!a}", "it holds half a surrogate pair; write it as valid Unicode"):
            text.encode()
        first, *others = self.seams.split(text)
        ids = (self.processor if dummy_prefix else self.bare).encode(first)
        for part in others:
            ids += self.bare.encode(part)
        return ids

    def decode(self, ids, partial=False):
        """Text of ids; control tokens, <image>, <pad> and the leading space are dropped.

        `partial`: more is to come, so a character of which only some bytes are there is held back.
        """
        ids = [int(i) for i in ids if 0 <= i < self.n_text and int(i) not in self.names]
        text = self.bare.decode(ids).removeprefix(self.prefix)
        return text.rstrip("\ufffd") if partial else text

    def piece(self, i):
        """How one id is written in a table."""
        return self.names.get(i) or (self.processor.id_to_piece(i) if i < self.n_text else "<unused>")

    def control_id(self, name):
        """The id of a control token that a template wants."""
        if name not in self.control:
            raise UserError(f"{self.path}: has no token {name}; use another --template, or another tokenizer")
        return self.control[name]


INTERNLM2_CONTROL = (
    "<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
INTERNVL_CONTROL = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split()
