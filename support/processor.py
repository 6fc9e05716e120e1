"""What transformers' AutoProcessor wants beside the weights: tokenizer, image processor, chat template.

    save_processor(DIR, "tokenizer.model", cfg)

But for tokenizer.model and tokenizer_config.json, which our own Tokenizer reads, all is written only where
transformers opens the model and then makes the ids of encode_prompt. Those it would not make
  - of llava_v0, in which a text may merge with the ### behind it;
  - with InternLM2's tokenizer, which puts no space before a text and has pieces for control tokens.
"""

import json
import re
import shutil
from pathlib import Path

from conversation import Tokenizer, find_template
from support.export import fits_llava, grid_pinpoints
from support.io import write_json, write_text, write_whole


def save_processor(directory, tokenizer_file, cfg):
    directory, tok = Path(directory), Tokenizer(tokenizer_file)
    write_json(directory / "tokenizer_config.json", tokenizer_config(cfg))
    write_whole(directory / "tokenizer.model", lambda tmp: shutil.copyfile(tokenizer_file, tmp))
    puts_space = tok.encode("a") != tok.encode("a", dummy_prefix=False)  # InternLM2 does not
    if not fits_llava(cfg) or not puts_space or cfg.template == "llava_v0":
        return
    write_json(directory / "tokenizer.json", tokenizer_json(tok.processor, cfg), indent=None)
    write_json(directory / "preprocessor_config.json", preprocessor_config(cfg))
    write_json(directory / "processor_config.json", {
        "processor_class": "LlavaNextProcessor" if cfg.tiling else "LlavaProcessor",
        "patch_size": cfg.vision.patch_size,
        "num_additional_image_tokens": cfg.vision.n_prefix,
        "vision_feature_select_strategy": "default",
    })  # fmt: skip
    write_json(directory / "generation_config.json", {
        "bos_token_id": cfg.bos_token,
        "eos_token_id": cfg.eos_token,
        "pad_token_id": cfg.pad_token,
        "suppress_tokens": list(range(cfg.image_token, cfg.decoder.vocab_size)),
    })  # fmt: skip
    form = find_template(cfg.template)
    if form.human:                       # stage 1 has no chat
        write_text(directory / "chat_template.jinja", chat_template(form))


def preprocessor_config(cfg):
    """The picture's way in. transformers has no letterbox, which differs from pad by a pixel at most."""
    S = cfg.vision.image_size
    kind = {"crop": "CLIP", "resize": "CLIP", "anyres": "LlavaNext"}.get(cfg.image_mode, "Llava")
    squashes = cfg.image_mode == "resize"
    square = {"height": S, "width": S}
    return grid_pinpoints(cfg) | {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_pad": kind != "CLIP",
        "size": square if squashes else {"shortest_edge": S},
        "do_center_crop": not squashes,
        "crop_size": square,
        "image_mean": list(cfg.vision.mean),
        "image_std": list(cfg.vision.std),
    }


# ---- chat template -----------------------------------------------------------------------------------------

JINJA = """\
{%- set strip = STRIP -%}
{%- macro pictures(messages) -%}
    {%- for message in messages if message.content is not string -%}
        {%- for part in message.content if part.type == "image" -%}<image>{%- endfor -%}
    {%- endfor -%}
{%- endmacro -%}
{%- macro words(message) -%}
    {%- set shown = "" if strip else pictures([message]) -%}
    {%- set said = message.content -%}
    {%- if said is not string -%}
        {%- set said = said | selectattr("type", "equalto", "text") | map(attribute="text") | join -%}
    {%- endif -%}
    {%- if shown == "<image>" -%}{{ (shown ~ "\\n" ~ said | trim) | trim }}
    {%- elif shown -%}{{ shown ~ "\\n" ~ said }}
    {%- else -%}{{ said | trim if strip else said }}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}ANSWER
    {%- elif message.role != "user" -%}{{ raise_exception("only user and assistant have turns here") }}
    {%- elif loop.first -%}FIRST
    {%- else -%}HUMAN
    {%- endif -%}
{%- endfor -%}
"""


def chat_template(form):
    """A conversation's Template in Jinja."""
    text = JINJA.replace("STRIP", "true" if form.tidy == "strip" else "false")
    known = {"<image>": "pictures(messages)", "{}": "words(message)", "«": '""', "»": '""'}
    for place, frame in ("FIRST", form.first), ("HUMAN", form.human), ("ANSWER", form.answer):
        pieces = re.split(r"(<image>|\{\}|[«»])", frame)
        in_jinja = ["{{- %s -}}" % known.get(piece, json.dumps(piece)) for piece in pieces]
        text = text.replace(place, "".join(in_jinja))
    return text


# ---- tokenizer ---------------------------------------------------------------------------------------------


def tokenizer_config(cfg):
    added = {cfg.image_token: {"content": "<image>", "special": True}}
    if cfg.pad_token != cfg.eos_token:
        added[cfg.pad_token] = {"content": "<pad>", "special": True}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "pad_token": "<pad>",
        "added_tokens_decoder": added,
        "extra_special_tokens": {"image_token": "<image>"},
        "model_max_length": cfg.decoder.block_size,
        "padding_side": "left",
    }


def tokenizer_json(sp, cfg):
    """A sentencepiece BPE model in the words of Hugging Face's tokenizers.

    A stretch of text gets a space in front, also after <image>, but not after <s> and </s>.
    """
    ids = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}

    # Merges: every way to make a word of two others, the best word first.
    words = [word for word, i in ids.items() if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))]
    words.sort(key=lambda word: -sp.get_score(ids[word]))
    splits = [(word[:k], word[k:]) for word in words for k in range(1, len(word))]
    merges = [[left, right] for left, right in splits if left in ids and right in ids]

    special = {
        "<unk>": sp.unk_id(),
        "<s>": cfg.bos_token,
        "</s>": cfg.eos_token,
        "<image>": cfg.image_token,
        "<pad>": cfg.pad_token,
    }
    # <s> and </s> are looked for after the spaces are set (normalized), so that none is put behind them.
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}
    added = [{"id": i, "content": name, "normalized": name in ("<s>", "</s>"), **plain}
             for name, i in special.items()]

    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"Regex": r"\A(?!</?s>)"}, "content": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "special_tokens": {"<s>": {"id": "<s>", "ids": [cfg.bos_token], "tokens": ["<s>"]}},
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, texts[0]],
            "pair": texts,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": merges,
        },
    }
