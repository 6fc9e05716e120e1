"""What is particular to a family's tokenizer: its sentencepiece model, and the control tokens beside it.

Llama's has <s> and </s> alone. InternLM2's turns six placeholder pieces into control tokens, which InternVL
goes on with; Prismatic adds <PAD>; other folders declare theirs in added_tokens.json and
tokenizer_config.json.
"""

import re
from itertools import count

import sentencepiece

from support.cli import UserError
from support.configs import layout_of
from support.io import read_json, reading

NOWHERE = "((?!))"                   # a pattern that matches nowhere
INTERNLM2_CONTROL = (
    "<|plugin|> <|interpreter|> <|action_end|> <|action_start|> <|im_end|> <|im_start|>".split())
INTERNVL_CONTROL = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split()


def read_sentencepiece(path):
    """-> the processor of a tokenizer.model, and one that puts no space before a text."""
    if not path.exists():
        raise UserError(
            f"{path}: no tokenizer there; copy the language model's tokenizer.model. Families that "
            "have none, such as Llama-3 and Qwen, are not supported")
    with reading(path, "copy the sentencepiece model again"):
        raw = path.read_bytes() or b"empty"
        processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
        # Of two protobufs written one after the other the later wins: this one says normalizer_spec
        # (field 3) { add_dummy_prefix (field 3): false }.
        without_space = sentencepiece.SentencePieceProcessor(model_proto=raw + b"\x1a\x02\x18\x00")
        processor.decode(list(range(processor.vocab_size())))  # a damaged piece is an error here
    if min(processor.bos_id(), processor.eos_id()) < 0:
        raise UserError(f"{path}: has no <s> or no </s>; train it with both, as Llama's has")
    if processor.decode(processor.encode("a  b\n")) != "a  b\n":  # the texts of a prompt would not add up
        raise UserError(
            f"{path}: does not keep spaces and newlines; train it as Llama's was: "
            "normalization_rule_name='identity', remove_extra_whitespaces=False, byte_fallback=True")
    return processor, without_space


def find_control_tokens(processor, folder):
    """-> {string: id} of <s>, </s>, InternLM2's placeholder pieces, and what the files in the folder declare;
    the ids of <image> and <pad>.

    Where no file names these two they are the next free ones, 32000 and 32001 in Llama as in llava-hf.
    InternLM2 pads with </s>. Prismatic has <PAD>, 32000, and no token for a picture: that is 32001 then, a
    row that it never uses.
    """
    n_text = processor.vocab_size()
    found = {"<s>": processor.bos_id(), "</s>": processor.eos_id()}
    placeholders = [processor.piece_to_id(f"[UNUSED_TOKEN_{i}]") for i in range(141, 147)]
    if placeholders[-1] != processor.unk_id():
        found |= zip(INTERNLM2_CONTROL, placeholders)
        found |= zip(INTERNVL_CONTROL, count(n_text))
    if layout_of(read_json(folder / "config.json", {})) == "Prismatic":
        found["<PAD>"] = n_text

    added = read_json(folder / "added_tokens.json", {})
    declared = read_json(folder / "tokenizer_config.json", {})
    with reading(f"{folder}: added_tokens.json or tokenizer_config.json", "copy both again"):
        found |= {name: int(i) for name, i in added.items()}
        for i, token in declared.get("added_tokens_decoder", {}).items():
            if token.get("special") or int(i) >= n_text:
                found[token["content"]] = int(i)
        if min(found.values()) < 0 or max(found.values()) > n_text + 10_000:
            raise UserError(f"ids of tokens are to be 0 to {n_text + 10_000:,}; copy both again")

    free = max(n_text, max(found.values()) + 1)
    image = found.get("<IMG_CONTEXT>", found.get("<image>", free))
    pad = found.get("<pad>", found.get("<PAD>", max(free, image + 1)))
    return found, image, found["</s>"] if "<|im_end|>" in found else pad


def find_cuts(processor, without_space, control_ids):
    """A pattern of the places where encode cuts a text in two, behind the first letter of such a piece:

    InternLM2's control tokens are pieces like others: "[UNUSED_TOKEN_145]" in a text would become one.
    """
    pieces = [processor.id_to_piece(i) for i in control_ids if i < processor.vocab_size()]
    pieces = [p for p in pieces if without_space.encode(p) == [processor.piece_to_id(p)]]
    cuts = [f"(?<={re.escape(p[0])})(?={re.escape(p[1:])})" for p in pieces]
    return re.compile("|".join(cuts) or NOWHERE)
