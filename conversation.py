"""conversation: moved here; to be rewritten."""

from dataclasses import dataclass
from itertools import count
from pathlib import Path
import difflib
import io
import re

import sentencepiece

from model import IGNORE
from support.cli import UserError
from support.io import read_json
from support.weights import prismatic_llm



class Tokenizer:
    """A sentencepiece model, and the table of its control tokens, {string: id}: those are never read from a text, only placed.

    Llama: <s> and </s>. InternLM2: also six placeholder pieces of the model, and InternVL's nine tokens behind them. Then whatever
    added_tokens.json and tokenizer_config.json of the same folder declare. `image` stands for one visual token and `pad` fills up a
    batch; where no file names them they take the next free ids, 32000 and 32001 in Llama as in llava-hf. Prismatic adds <PAD> as
    32000 and has no token for a picture: 32001 then, a row that it never uses.
    """

    def __init__(self, path):
        path = Path(path)
        self.path = path / "tokenizer.model" if path.is_dir() else path
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: no tokenizer there ({error.strerror}); copy there the tokenizer.model, a sentencepiece model, "
                            "that belongs to its language model") from None
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=raw or b"empty")
            # The same model without the space it puts before a text. Two protobufs written one after the other are merged, the
            # later field wins: this one says normalizer_spec (field 3) { add_dummy_prefix (field 3): false }.
            self.bare = sentencepiece.SentencePieceProcessor(model_proto=raw + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise UserError(f"{self.path}: not a sentencepiece model, or cut off ({len(raw):,} bytes); copy the file again") from None
        self.n_text = self.processor.vocab_size()
        self.bos, self.eos = self.processor.bos_id(), self.processor.eos_id()
        if min(self.bos, self.eos) < 0:
            raise UserError(f"{self.path}: has no <s> or no </s>; train it with both, as Llama's has")
        if self.bare.decode(self.bare.encode("a  b\n")) != "a  b\n":     # else newlines would vanish and the pieces of a prompt not add up
            raise UserError(f"{self.path}: does not keep spaces and newlines; train it as Llama's was: normalization_rule_name='identity', "
                            "remove_extra_whitespaces=False, byte_fallback=True")
        self.prefix = " " * (self.processor.encode("a") != self.bare.encode("a"))    # InternLM2 puts no space before a text
        self.control = self.control_tokens(self.path.parent)
        free = count(max(self.n_text, *(i + 1 for i in self.control.values())))
        image, pad = ([self.control[name] for name in names.split() if name in self.control] for names in ("<IMG_CONTEXT> <image>", "<pad> <PAD>"))
        self.image = image[0] if image else next(free)
        self.pad = pad[0] if pad else self.eos if "<|im_end|>" in self.control else next(free)       # InternLM2 pads with </s>
        self.names = {self.image: "<image>", self.pad: "<pad>"} | {i: name for name, i in self.control.items()}
        self.n_id = max(self.n_text - 1, *self.names) + 1                # every id is below this; rows of a new embedding: 32064, or 92553
        self.vocab_size = self.n_id if "<IMG_CONTEXT>" in self.control else -(-self.n_id // 64) * 64
        # A control token that is a piece like others, "[UNUSED_TOKEN_145]", would be found in a text: there the text is cut in two
        pieces = [self.processor.id_to_piece(i) for i in self.names if i < self.n_text]
        pieces = [p for p in pieces if self.bare.encode(p) == [self.processor.piece_to_id(p)]]
        self.typed = re.compile("|".join(f"(?<={re.escape(p[0])})(?={re.escape(p[1:])})" for p in pieces) or "(?!)")

    def control_tokens(self, folder):
        """{string: id} of <s>, </s>, what InternLM2 means by its placeholder pieces, and what the files beside the model declare."""
        found = {"<s>": self.bos, "</s>": self.eos}
        placeholders = [self.processor.piece_to_id(f"[UNUSED_TOKEN_{i}]") for i in range(141, 147)]
        if placeholders[-1] != self.processor.unk_id():
            found |= zip("<|plugin|> <|interpreter|> <|action_end|> <|action_start|> <|im_end|> <|im_start|>".split(), placeholders)
            found |= zip("<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split(), count(self.n_text))   # InternVL's
        config, added, declared = (read_json(folder / f"{name}.json", {}) for name in ("config", "added_tokens", "tokenizer_config"))
        if prismatic_llm(config):
            found["<PAD>"] = self.n_text
        try:
            found |= {name: int(i) for name, i in added.items()}
            for i, token in declared.get("added_tokens_decoder", {}).items():
                if token.get("special") or int(i) >= self.n_text:
                    found[token["content"]] = int(i)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}: added_tokens.json or tokenizer_config.json do not list tokens and ids ({error!r}); copy both") from None
        return found

    def encode(self, text, dummy_prefix=True):
        """Ids of a text, without <s> and </s>, and never a control token whatever the text says.

        `dummy_prefix` is sentencepiece's habit of putting a space before the text. Wanted at the start of a text, wrong in the middle.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"text with half a surrogate pair at character {error.start}: {text[:40]!a}; write it as valid Unicode") from None
        text, *rest = self.typed.split(text)
        return (self.processor if dummy_prefix else self.bare).encode(text) + [i for part in rest for i in self.bare.encode(part)]

    def decode(self, ids, partial=False):
        """Text of ids; control tokens, <image>, <pad> and the leading space are dropped.

        `partial` is for printing while ids still come in: a character of which only some bytes are there is held back, so that each
        text begins with the one before it.
        """
        ids = [int(i) for i in ids]
        text = self.bare.decode([i for i in ids if 0 <= i < self.n_text and i not in self.names]).removeprefix(self.prefix)
        return text.rstrip("\ufffd") if partial else text

    def piece(self, i):
        """How one id is written in a table."""
        return self.names.get(i) or (self.processor.id_to_piece(i) if i < self.n_text else "<unused>")

    def place(self, name):
        """The id of a control token that a template wants."""
        if name not in self.control:
            raise UserError(f"{self.path}: has no token {name}; use another --template, or the tokenizer that belongs to this one")
        return self.control[name]



@dataclass(frozen=True)
class Template:
    """How turns become one text. "{}" is the turn's own text, and what stands between « and » is supervised. <s>, </s>, <|im_start|>
    and <|im_end|> are control tokens here and nowhere else; an <image> is the place of all pictures."""
    first: str                       # the first question and all that stands around it
    human: str | None                # each later question; None: there can be no later one
    answer: str
    stop: str = "</s>"               # what ends an answer: a control token, or else a string to look for (cut_at_stop)
    turn: str = "front"              # what is done to a turn: "front" puts its <image> there, "strip" strips it, "" nothing
    around: tuple = ()               # control tokens before and after each picture
    keep_question: bool = True       # False: of a question only its pictures stay



VICUNA, HUMAN = (f"A chat between a curious {who} and an artificial intelligence assistant. "
               f"The assistant gives helpful, detailed, and polite answers to the {who}'s questions." for who in ("user", "human"))
LLAMA_2 = ("You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
           "and assist the user with a variety of tasks using natural language.")
INTERNVL2 = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
INTERNVL2_5 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
ASK, ASK_LINES = (f"<|im_start|>user\n{{}}<|im_end|>{end}<|im_start|>assistant\n" for end in ("", "\n"))
INTERN = {"stop": "<|im_end|>", "around": ("<img>", "</img>")}
# Prismatic encodes each turn by itself, with its own dummy prefix: that is the space before a later question, a byte that its strings
# lack and its ids have. It puts the pictures right after <s>. "<<SYS>" is its own misspelling, which its weights have learned.
TEMPLATES = {
    "vicuna_v1": Template(VICUNA + " USER: {} ASSISTANT:", "USER: {} ASSISTANT:", "« {}</s>»"),                   # LLaVA-1.5, stage 2
    "llava_v1": Template(HUMAN + " USER: {} ASSISTANT:", "USER: {} ASSISTANT:", "« {}</s>»"),
    # llava_v0 is trained here as it is asked; the original trained with "\n\n### Human: q\n### Assistant: a\n### ", same parts supervised
    "llava_v0": Template(HUMAN + "###Human: {}«###Assistant:»", "Human: {}«###Assistant:»", "« {}###»", stop="###"),
    "llava_llama_2": Template(f"[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n{{}} [/INST]", "<s>[INST] {} [/INST]", "« {} </s>»"),
    "plain": Template("{}", None, "«{}\n»", stop="\n", keep_question=False),                                      # LLaVA, stage 1
    "prism_plain": Template("{}", None, "«{}</s>»", turn="strip", keep_question=False),                           # Prismatic's align stage
    "prism_pure": Template("<image>In: {}\nOut:", " In: {}\nOut:", "« {}</s>»", turn="strip"),
    "prism_vicuna": Template(f"<image>{VICUNA} USER: {{}} ASSISTANT:", " USER: {} ASSISTANT:", "« {}</s>»", turn="strip"),
    "prism_llama_2": Template(f"<image>[INST] <<SYS>\n{LLAMA_2}\n<</SYS>>\n\n{{}} [/INST]", " [INST] {} [/INST]", "« {}</s>»", turn="strip"),
    "prism_mistral": Template("<image>[INST] {} [/INST]", " [INST] {} [/INST]", "« {}</s>»", turn="strip"),
    "internlm2-chat": Template(f"<|im_start|>system\n{INTERNVL2}<|im_end|>{ASK}", ASK, "«{}<|im_end|>»", turn="strip", **INTERN),
    "internvl2_5": Template(f"<|im_start|>system\n{INTERNVL2_5}<|im_end|>\n{ASK_LINES}", ASK_LINES, "«{}<|im_end|>»\n", turn="", **INTERN),
}



def find_template(name):
    if name not in TEMPLATES:
        near = difflib.get_close_matches(str(name), TEMPLATES, n=1, cutoff=0.0)
        raise UserError(f"template {name!r} is unknown; did you mean {near[0]!r}? Known are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]



def stop_ids(tok, template):
    """Ids that end an answer: </s>, and the template's own."""
    stop = find_template(template).stop
    return [tok.eos, tok.place(stop)] if stop.startswith("<|") else [tok.eos]



def cut_at_stop(text, template, partial=False):
    """The answer in a text, where the stop is no id but a string, ### or a newline. `partial`: what may be its beginning is held back."""
    stop = find_template(template).stop
    if stop.startswith("<"):
        return text
    text, found, _ = text.partition(stop)
    return text.rstrip(stop[0]) if partial and not found else text         # both are runs of one character



def train_tokenizer(path, lines, vocab_size, required=""):
    """Write Llama's kind of sentencepiece model: byte pairs, characters that no line has as bytes, no piece for a newline or two spaces.

    `required`: characters that become pieces however rare they are. The same lines give the same file.
    """
    if vocab_size < 260:
        raise UserError(f"no tokenizer of {vocab_size} tokens: bytes and marks alone are 259, and then come characters and words; give more")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line.strip() for line in lines), model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
            add_dummy_prefix=True, normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
            required_chars=required, split_digits=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    except (RuntimeError, TypeError, ValueError) as error:                 # also where half a character (a lone surrogate) is in a text
        why = str(error).rpartition("] ")[2].split(" or decrease character_coverage")[0] or "they hold no words"
        raise UserError(f"no tokenizer of {vocab_size} tokens can be made of these texts: {why}") from None
    Path(path).write_bytes(model.getvalue())



def encode_conversation(tok, turns, template, n_visual):
    """[("human", text), ("gpt", text), ...] -> tokens, labels (two lists). n_visual: visual tokens of each <image>, in order.

    A leading answer is dropped, as in the original, and so is a question left without an answer at the end (it would cost nothing).
    """
    turns = turns[:-1] if turns and turns[-1][0] == "human" else turns
    return encode_turns(tok, arrange(turns, template, len(n_visual)), template, n_visual)



def encode_prompt(tok, turns, template, n_visual):
    """The same conversation up to where the next answer begins: the last turn is a question. -> tokens (a list)"""
    if not turns or turns[-1][0] != "human":
        raise UserError("a prompt must end with a human turn")
    return encode_turns(tok, arrange(turns, template, len(n_visual)), template, n_visual)[0]



def arrange(turns, template, n_image):
    """Check the turns, and bring every <image> to its place. In a record without pictures "<image>" is a word like any other."""
    form = find_template(template)
    turns = turns[1:] if turns and turns[0][0] == "gpt" else turns
    if not turns:
        raise UserError("no answer to learn from; a human turn and a gpt turn after it are needed")
    for k, (role, text) in enumerate(turns):
        if role != ("human", "gpt")[k % 2]:
            raise UserError(f"turn {k + 1} is from {role!r}; turns must go human, gpt, human, gpt")
        if role == "gpt" and not text.strip():
            raise UserError(f"the answer in turn {k + 1} is empty; write it or drop the record")
        if role == "gpt" and "<image>" in text and n_image:
            raise UserError(f"the answer in turn {k + 1} holds <image>; pictures can only stand in a question")
    if len(turns) > 2 and form.human is None:
        raise UserError(f"template {template} is for one question and one answer, here are {len(turns)} turns; use another --template")
    if not form.keep_question and not n_image:
        raise UserError(f"template {template} needs a picture; use another --template for text alone")
    n_marker = sum(text.count("<image>") for _, text in turns) if n_image else 0
    if (n_marker, n_image) == (0, 1):
        turns, n_marker = [("human", "<image>\n" + turns[0][1]), *turns[1:]], 1
    if n_marker != n_image:
        raise UserError(f"{n_marker} <image> but {n_image} picture{'s' * (n_image != 1)}; write one <image> in the questions for each picture")
    return [(role, tidy(text, role, form, n_image)) for role, text in turns]



def tidy(text, role, form, n_image):
    """A turn's text as the original model's data code leaves it. LLaVA's <image> goes to the front if it stood at either end."""
    if role == "human" and not form.keep_question:
        return "<image>" * text.count("<image>")
    if "<image>" in form.first:
        text = text.replace("<image>", "")
    rest = text.strip()
    if form.turn == "front" and n_image and text.count("<image>") == 1 and (rest.startswith("<image>") or rest.endswith("\n<image>")):
        return ("<image>\n" + rest.replace("<image>", "").strip()).strip()
    return rest if form.turn == "strip" else text



TYPED = "<\0image>"                  # how as_text writes an <image>. Nobody can type a NUL



def as_text(text):
    """What a user or a model has written, of which <image> is a word and no picture's place, for a conversation that has pictures."""
    return text.replace("<image>", TYPED)



CONTROL = r"(</?s>|<\|im_start\|>|<\|im_end\|>|<image>|[«»])"           # what a template's own strings are cut at



def encode_turns(tok, turns, template, n_visual):
    """First one list of spans, then each span to ids. Where a span may end without changing the ids of its neighbours:

    - before the space that opens an answer: "ASSISTANT:" and " A cat." give the ids of "ASSISTANT: A cat.", since a Llama piece
      has spaces only at its start and none can lie across (a piece in the middle gets no dummy prefix);
    - around a control token, as always;
    - around a picture LLaVA encodes each side by itself, with its own dummy prefix. So do we: ":", " ", <image>..., " ", "\\n".
    Where a span ends elsewhere (before ### in llava_v0, after "assistant\\n" in InternVL) the prompt of generation ends there too.
    """
    form, spans, supervised = find_template(template), [], False           # [special, text, supervised]
    for k, (role, text) in enumerate(turns):
        frame = form.answer if role == "gpt" else form.human if k else form.first.replace("<image>", "<image>" * len(n_visual))
        before, after = frame.split("{}")
        for part, special in (before, CONTROL), (text, "(<image>)" if n_visual else "((?!))"), (after, CONTROL):
            for j, piece in enumerate(re.split(special, part)):            # text, special, text, special, ..., text
                if piece in ("«", "»") and j % 2:
                    supervised = piece == "«"
                elif j % 2 or piece and (not spans or spans[-1][::2] != [False, supervised]):
                    spans.append([j % 2 == 1, piece, supervised])
                elif piece:
                    spans[-1][1] += piece

    tokens, labels, n_visual = [tok.bos], [IGNORE], iter(n_visual)
    fresh = True                                                           # the next text opens a stretch: it gets the dummy prefix
    for special, text, supervised in spans:
        if not special:
            ids = tok.encode(text.replace(TYPED, "<image>"), dummy_prefix=fresh)
        elif text == "<image>":
            ids = [tok.image] * next(n_visual)
            if form.around:
                ids = [tok.place(form.around[0]), *ids, tok.place(form.around[1])]
        else:
            ids = [tok.place(text)]
        tokens += ids
        labels += ids if supervised else [IGNORE] * len(ids)
        fresh = special and text == "<image>" and not form.around
    return tokens, labels
