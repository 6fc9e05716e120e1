"""What a record becomes on its way to the model. Every name is a claim."""

import io
import json
import os
import random
import re
import string
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from common import save, tiny_config
from PIL import Image
from torch.testing import assert_close

import eval
import support.cli as support_cli
import tools.show as tools_show
from benchmarks.common import load_records
from conversation import (
    TEMPLATES,
    Tokenizer,
    cut_at_stop,
    encode_conversation,
    encode_prompt,
    find_template,
    stop_ids,
)
from data import Examples, augment, collate
from model import IGNORE, PRESETS, VLM, DecoderConfig, VLMConfig
from support.cli import UserError
from support.control_tokens import read_sentencepiece
from support.data_files import Records, picture_paths
from support.io import read_json, read_rows, reading
from support.picture_files import open_image
from support.templates import SYSTEM_VICUNA
from support.weights import open_weights
from train import Answering
from vision import VisionConfig

SHARED = Path(__file__).parents[2] / "shared"
LLAMA = SHARED / "tokenizers" / "llama2.model"
PHOTOS = SHARED / "photo_vqa"
CONTROLS = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "<box>",
    "[UNUSED_TOKEN_145]",
    "[UNUSED_TOKEN_146]",
    "<0x0A>",
    "«",
    "»",
    "{}",
]
TEXTS = [
    "Hello world",
    " two  spaces ",
    "\n",
    "",
    "a\tb\r\n",
    "</s>",
    "<image> <pad>",
    "naïve café",
    "Straße 12,50 €",
    "你好，世界",
    "こんにちは",
    "مرحبا بالعالم",
    "Привет, мир!",
    "🙂👩‍👩‍👧 é",
    "x = [0.12, 0.98]\n\n  indented",
    "ASSISTANT: A cat.",
    "\x00\x07",
    "line\u2028paragraph\u2029next\x85end",
]


def train(folder, **change):
    """A sentencepiece model of a few hundred pieces, as Llama's was trained."""
    model = io.BytesIO()
    text = f"{SYSTEM_VICUNA} USER: What is this? ASSISTANT: A red cat on a bus. Where? Left. "
    text += " ".join(string.printable[:95])
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter([text] * 20),
            "model_writer": model,
            "model_type": "bpe",
            "vocab_size": 600,
            "hard_vocab_limit": False,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
            "minloglevel": 2,
            **change,
        }
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def tok(folder):
    return Tokenizer(folder)


@pytest.fixture(scope="session")
def intern(tmp_path_factory):
    """A tokenizer made like InternLM2's: placeholder pieces that stand for its control tokens, and no space
    before a text."""
    placeholders = [f"[UNUSED_TOKEN_{i}]" for i in range(141, 147)]
    return Tokenizer(
        train(
            tmp_path_factory.mktemp("intern") / "model",
            user_defined_symbols=placeholders,
            add_dummy_prefix=False,
        )
    )


@pytest.fixture(scope="session")
def llama():
    if not LLAMA.exists():
        pytest.skip(f"needs {LLAMA}")
    return Tokenizer(LLAMA)


def supervised(tok, labels):
    """The supervised stretch as text, with </s> written out."""
    return (
        "".join("</s>" if i == tok.eos else tok.piece(i) for i in labels if i != IGNORE)
        .replace("▁", " ")
        .replace("<0x0A>", "\n")
    )


# ---- which tokens are supervised --------


def test_vicuna_supervises_the_answer_and_its_end_and_nothing_else(tok):
    tokens, labels = encode_conversation(
        tok, [("human", "<image>\nWhat is this?"), ("gpt", "A cat.")], "vicuna_v1", [4]
    )
    assert supervised(tok, labels) == " A cat.</s>"
    n = sum(label != IGNORE for label in labels)
    assert labels[-n:] == tokens[-n:] and set(labels[:-n]) == {IGNORE}  # one stretch, at the very end


def test_vicuna_supervises_every_answer_of_two_turns(llama):
    turns = [
        ("human", "<image>\nWhat is this?"),
        ("gpt", "A red bus."),
        ("human", "Where?"),
        ("gpt", "Street"),
    ]
    tokens, labels = encode_conversation(llama, turns, "vicuna_v1", [576])
    assert [llama.piece(i) for i in labels if i != IGNORE] == "▁A ▁red ▁bus . </s> ▁Street </s>".split()
    assert all(label in (IGNORE, token) for token, label in zip(tokens, labels))  # not shifted
    assert tokens.count(llama.image) == 576 and tokens[0] == llama.bos and tokens.count(llama.bos) == 1


def test_plain_supervises_the_caption_and_the_newline_and_discards_the_question(tok):
    turns = [("human", "Describe it.\n<image>"), ("gpt", "a red cat")]
    tokens, labels = encode_conversation(tok, turns, "plain", [3])
    assert tokens[:4] == [tok.bos, tok.image, tok.image, tok.image] and labels[:4] == [IGNORE] * 4
    assert supervised(tok, labels) == " a red cat\n" and IGNORE not in labels[4:]  # no </s>
    assert tokens[4:] == tok.encode("a red cat\n")


def test_a_leading_answer_and_a_last_question_without_answer_are_left_out(tok):
    turns = [("human", "What?"), ("gpt", "A cat.")]
    whole = encode_conversation(tok, turns, "vicuna_v1", [])
    assert encode_conversation(tok, [("gpt", "Hi."), *turns, ("human", "Where?")], "vicuna_v1", []) == whole


# ---- templates --------

USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
# Two questions about one picture, written out from the facts sheets; « » around what is supervised.
# Prismatic's later questions begin with the space that encoding each turn by itself puts into the ids.
EXPECTED = {
    "vicuna_v1": "<s>"
    + USER
    + " USER: <image>\nWhat? ASSISTANT:« A cat.</s>»USER: Why? ASSISTANT:« Fur.</s>»",
    "llava_v1": "<s>"
    + HUMAN
    + " USER: <image>\nWhat? ASSISTANT:« A cat.</s>»USER: Why? ASSISTANT:« Fur.</s>»",
    "llava_v0": "<s>"
    + HUMAN
    + "###Human: <image>\nWhat?«###Assistant: A cat.###»Human: Why?«###Assistant: Fur.###»",
    "llava_llama_2": "<s>[INST] <<SYS>>\n"
    + HELPFUL
    + "\n<</SYS>>\n\n<image>\nWhat? [/INST]« A cat. </s>»<s>[INST] Why? [/INST]« Fur. </s>»",
    "mistral_instruct": "<s>[INST] <image>\nWhat? [/INST]« A cat. </s>»[INST] Why? [/INST]« Fur. </s>»",
    "plain": "<s><image>«A cat.\n»",
    "prism_plain": "<s><image>«A cat.</s>»",
    "prism_pure": "<s><image>In: What?\nOut:« A cat.</s>» In: Why?\nOut:« Fur.</s>»",
    "prism_vicuna": "<s><image>"
    + USER
    + " USER: What? ASSISTANT:« A cat.</s>» USER: Why? ASSISTANT:« Fur.</s>»",
    "prism_llama_2": "<s><image>[INST] <<SYS>\n"
    + HELPFUL
    + "\n<</SYS>>\n\nWhat? [/INST]« A cat.</s>» [INST] Why? [/INST]« Fur.</s>»",
    "prism_mistral": "<s><image>[INST] What? [/INST]« A cat.</s>» [INST] Why? [/INST]« Fur.</s>»",
    "internlm2-chat": "<s><|im_start|>system\n你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
    "<|im_end|><|im_start|>user\n<img><image></img>\nWhat?<|im_end|><|im_start|>assistant\n«A cat.<|im_end|>»"
    "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n«Fur.<|im_end|>»",
    "internvl2_5": "<s><|im_start|>system\n你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    "<|im_end|>\n<|im_start|>user\n<img><image></img>\nWhat?<|im_end|>\n"
    "<|im_start|>assistant\n«A cat.<|im_end|>»\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n«Fur.<|im_end|>»\n",
}
CAT = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Why?"), ("gpt", "Fur.")]


def written_out(tok, tokens, labels):
    """Tokens as the string that they encode: a picture is one <image>, a dummy prefix (after the first <s> or
    a picture) is left out."""
    runs, text = [], ""  # [kind, supervised, ids]
    for i, label in zip(tokens, labels):
        kind = "<image>" if i == tok.image else tok.names.get(i, "text")
        if runs and runs[-1][:2] == [kind, label != IGNORE] and kind in ("<image>", "text"):
            runs[-1][2].append(i)
        else:
            runs.append([kind, label != IGNORE, [i]])
        assert label in (IGNORE, i)  # labels are not shifted
    for k, (kind, supervised, ids) in enumerate(runs):
        piece = tok.without_space.decode(ids) if kind == "text" else kind
        if kind == "text" and (k == 1 or runs[k - 1][0] == "<image>"):
            piece = tok.decode(ids)
        text += f"«{piece}»" if supervised else piece
    return text.replace("»«", "")


def tokenizers(name, tok, llama, intern):
    return [intern] if name.startswith("intern") else [tok, llama]


def test_every_template_has_its_expected_string_here():
    assert sorted(EXPECTED) == sorted(TEMPLATES)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_template_gives_this_string_and_supervises_this_part_of_it(name, tok, llama, intern):
    turns = CAT if TEMPLATES[name].human else CAT[:2]
    for t in tokenizers(name, tok, llama, intern):
        assert written_out(t, *encode_conversation(t, turns, name, [3])) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_training_continues_the_ids_that_generation_begins_with(name, tok, llama, intern):
    rng = random.Random(1)
    for t in tokenizers(name, tok, llama, intern):
        for _ in range(40):
            n = rng.choice((1, 2, 3)) if TEMPLATES[name].human else 1
            texts = [
                " ".join(rng.choices(TEXTS + CONTROLS, k=3)).replace("<image>", "")
                + rng.choice(("x", "#", " ", "\n"))
                for _ in range(2 * n)
            ]
            n_visual = [2] if rng.random() < 0.5 or not TEMPLATES[name].keep_question else []
            turns = [(("human", "gpt")[k % 2], text + "a" * (k % 2)) for k, text in enumerate(texts)]
            tokens, labels = encode_conversation(t, turns, name, n_visual)
            prompt = encode_prompt(t, turns[:-1], name, n_visual)
            assert tokens[: len(prompt)] == prompt and labels[len(prompt)] == tokens[len(prompt)]
            assert stop_ids(t, name)[-1] in labels or TEMPLATES[name].stop in ("###", "\n")


@pytest.mark.parametrize("name", EXPECTED)
def test_whatever_a_user_types_no_control_token_comes_of_it(name, tok, llama, intern):
    for t in tokenizers(name, tok, llama, intern):
        n_visual, form = ([] if TEMPLATES[name].keep_question else [1]), TEMPLATES[name]
        plain, _ = encode_conversation(t, [("human", "x"), ("gpt", "y")], name, n_visual)
        said = " ".join(CONTROLS + ["<image>"] * (not n_visual))
        typed, _ = encode_conversation(t, [("human", said), ("gpt", said)], name, n_visual)
        control = {*t.control.values(), t.image, t.pad}
        assert [i for i in typed if i in control] == [i for i in plain if i in control]
        stays = (
            said.replace(" <image>", "") if "prism" in name else said
        )  # Prismatic removes <image> from every text
        assert t.decode(typed).count(stays) == 1 + form.keep_question  # question and answer


def test_hash_signs_part_the_turns_of_llava_v0_and_are_text_to_every_other(tok):
    tokens, labels = encode_conversation(tok, [("human", "a ### b"), ("gpt", "c")], "llava_v0", [])
    assert "Human: a ### b«###Assistant: c###»" in written_out(
        tok, tokens, labels
    )  # cannot be told from a user's own


def test_each_template_says_where_its_answers_end(tok, intern):
    assert stop_ids(tok, "vicuna_v1") == stop_ids(tok, "llava_v0") == [tok.eos]
    assert stop_ids(intern, "internvl2_5") == [intern.eos, intern.control["<|im_end|>"]]
    assert (
        cut_at_stop(" A cat.###Human: no", "llava_v0") == " A cat."
        and cut_at_stop("a</s> #### b", "vicuna_v1") == "a</s> #### b"
    )
    assert cut_at_stop("a red cat\nmore", "plain") == "a red cat"
    said = [cut_at_stop("C# is ##nice###Human"[:n], "llava_v0", partial=True) for n in range(21)]
    assert all(b.startswith(a) for a, b in zip(said, said[1:])) and said[-1] == "C# is ##nice"


def test_a_template_that_wants_tokens_the_tokenizer_has_not_is_an_error(tok):
    with pytest.raises(
        UserError, match=r"tokenizer.model: has no token <\|im_start\|>; use another --template"
    ):
        encode_prompt(tok, [("human", "x")], "internvl2_5", [])


@pytest.mark.parametrize("name", ["Hermes-2", "phi-2-3b"])
def test_a_template_that_is_not_here_is_an_error(name):
    with pytest.raises(UserError, match=f"template '{name}' is unknown; did you mean"):
        find_template(name)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_captions_of_stage_1_have_the_template_of_the_models_family(name):
    assert TEMPLATES[name].captions == ("prism_plain" if "prism" in name else "plain")
    assert not TEMPLATES[TEMPLATES[name].captions].keep_question


def test_stage_1_of_a_prismatic_model_supervises_the_end_token_and_of_llava_a_newline(tok):
    for name, end in ("prism_pure", "</s>"), ("vicuna_v1", "\n"):
        model_cfg = replace(PRESETS["toy"], template=name)
        cfg = SimpleNamespace(template="", stage="pretrain", max_length=64, augment=False)
        task = Answering(cfg, None, SimpleNamespace(cfg=model_cfg), tok)
        turns = [("human", "<image>"), ("gpt", "a cat")]
        _, labels = encode_conversation(tok, turns, task.examples.template, [1])
        assert supervised(tok, labels).endswith("cat" + end)


# ---- ids --------


def test_ids_around_the_picture_and_after_the_end_token_are_the_originals(llama):
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A cat."), ("human", "Why?"), ("gpt", "Fur")]
    tokens, _ = encode_conversation(llama, turns, "vicuna_v1", [1])
    at = tokens.index(llama.image)
    assert tokens[at - 4 : at + 4] == [
        3148,
        1001,
        29901,
        29871,
        32000,
        29871,
        13,
        5618,
    ]  # ▁US ER : ▁ <image> ▁ \n What
    assert tokens[tokens.index(llama.eos) + 1] == 11889  # USER
    assert tokens[-1] == llama.eos == 2 and tokens[0] == llama.bos == 1
    assert (llama.n_text, llama.image, llama.pad, llama.vocab_size) == (32000, 32000, 32001, 32064)


@pytest.mark.parametrize(
    "question, ids",
    [
        ("What is this?", [512, 29901, 1724, 338, 445, 29973, 13, 3744, 29901]),
        (
            "What is this?\nAnswer the question using a single word or phrase.",
            [
                512,
                29901,
                1724,
                338,
                445,
                29973,
                13,
                22550,
                278,
                1139,
                773,
                263,
                2323,
                1734,
                470,
                16549,
                29889,
                13,
                3744,
                29901,
            ],
        ),
    ],
)
def test_prismatics_base_prompt_has_its_golden_ids_with_the_patches_after_bos(llama, question, ids):
    assert encode_prompt(llama, [("human", question)], "prism_pure", []) == [1, *ids]
    assert encode_prompt(llama, [("human", f"{question}\n<image>")], "prism_pure", [5]) == [
        1,
        *[llama.image] * 5,
        *ids,
    ]


def test_prismatics_ids_are_those_of_each_turn_by_itself(llama):
    turns = [
        ("human", " Is it <image> red? "),
        ("gpt", "Yes,\n\nit is. "),
        ("human", "Why?"),
        ("gpt", "  Paint "),
    ]
    strings = {
        "prism_pure": ["In: Is it  red?\nOut:", "Yes,\n\nit is.", "In: Why?\nOut:", "Paint"],
        "prism_vicuna": [
            USER + " USER: Is it  red? ASSISTANT:",
            "Yes,\n\nit is.",
            "USER: Why? ASSISTANT:",
            "Paint",
        ],
        "prism_mistral": ["[INST] Is it  red? [/INST]", "Yes,\n\nit is.", "[INST] Why? [/INST]", "Paint"],
        "prism_llama_2": [
            "[INST] <<SYS>\n" + HELPFUL + "\n<</SYS>>\n\nIs it  red? [/INST]",
            "Yes,\n\nit is.",
            "[INST] Why? [/INST]",
            "Paint",
        ],
    }
    for name, parts in strings.items():
        ids = [llama.encode(part) + [llama.eos] * (k % 2) for k, part in enumerate(parts)]
        tokens, labels = encode_conversation(llama, turns, name, [2])
        assert tokens == [1, llama.image, llama.image, *sum(ids, [])]
        assert labels == [IGNORE] * (3 + len(ids[0])) + ids[1] + [IGNORE] * len(ids[2]) + ids[3]


def test_llava_v0_and_llama_2_have_the_ids_of_one_encoding_of_the_whole_string(llama):
    turns = [("human", "What: is it?"), ("gpt", "A cat."), ("human", "Why so?"), ("gpt", "Fur.")]
    assert encode_conversation(llama, turns, "llava_v0", [])[0] == [1] + llama.encode(
        HUMAN + "###Human: What: is it?###Assistant: A cat.###Human: Why so?###Assistant: Fur.###"
    )
    first, second = (
        f"[INST] <<SYS>>\n{HELPFUL}\n<</SYS>>\n\nWhat: is it? [/INST] A cat. ",
        "[INST] Why so? [/INST] Fur. ",
    )
    tokens, labels = encode_conversation(llama, turns, "llava_llama_2", [])
    assert tokens == [1, *llama.encode(first), 2, 1, *llama.encode(second, dummy_prefix=False), 2]
    assert [llama.piece(i) for i in labels if i != IGNORE] == "▁A ▁cat . ▁ </s> ▁Fur . ▁ </s>".split()


def test_text_of_a_conversation_has_the_ids_of_one_encoding_of_the_whole_string(tok, llama):
    rng = random.Random(0)
    for t in (tok, llama):
        for _ in range(100):
            question, answer = (" ".join(rng.choices(TEXTS, k=3)) + "?" for _ in range(2))
            question, answer = question.replace("<image>", ""), answer.replace("<image>", "")
            tokens, _ = encode_conversation(t, [("human", question), ("gpt", answer)], "vicuna_v1", [])
            assert tokens == [t.bos] + t.encode(
                f"{SYSTEM_VICUNA} USER: {question} ASSISTANT: {answer}"
            ) + [t.eos]


def test_no_piece_of_llama_reaches_over_a_space(llama):
    assert not any(
        "▁" in llama.piece(i).lstrip("▁") for i in range(llama.n_text)
    )  # why an answer may be encoded by itself


def test_a_prompt_is_the_conversation_up_to_its_last_answer(tok):
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Where?"), ("gpt", "Left.")]
    tokens, labels = encode_conversation(tok, turns, "vicuna_v1", [5])
    prompt = encode_prompt(tok, turns[:3], "vicuna_v1", [5])
    assert tokens[: len(prompt)] == prompt and tok.decode(prompt).endswith("ASSISTANT:")
    assert labels[len(prompt) :] == tokens[len(prompt) :]


ALPHABETS = [
    "etaoinshrdlu ETA. ,?",
    "áçèñöüßøÅ ñ",
    "привет мир Ж",
    "αβγδ εζη",
    "你好世界，图片 。",
    "こんにちは カタカナ",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดี ชาว",
    "🙂👩‍👧🏽🇫🇷é",
    "0123456789 +-=%€",
    "(){}[]<>/\\_#@\n\t\"'",
]


def test_encoding_equals_the_reference_tokenizer_on_1000_strings(llama, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(LLAMA.read_bytes())
    reference = transformers.LlamaTokenizer.from_pretrained(tmp_path, legacy=False)
    rng = random.Random(0)
    texts = [t for t in TEXTS if "</s>" not in t]
    texts += [
        "".join(rng.choice(rng.choice(rng.choices(ALPHABETS, k=2))) for _ in range(rng.randrange(1, 50)))
        for _ in range(1000)
    ]
    for text in texts:
        text = re.sub(" +", " ", text).lstrip(
            " "
        )  # runs of spaces: transformers 5 departs from sentencepiece, which the next test pins
        assert llama.encode(text) == reference.encode(text, add_special_tokens=False), text
    turns = [("human", "What is it?"), ("gpt", "A cat."), ("human", "Why?"), ("gpt", "Its fur.")]
    whole = f"{USER} USER: What is it? ASSISTANT: A cat.</s>USER: Why? ASSISTANT: Its fur.</s>"
    assert encode_conversation(llama, turns, "vicuna_v1", [])[0][1:] == reference.encode(
        whole, add_special_tokens=False
    )


def test_runs_of_spaces_have_the_ids_that_llama_was_trained_with(llama):
    assert [llama.encode(text) for text in ("Hello", " Hello", "  Hello", "   Hello")] == [
        [15043],
        [29871, 15043],
        [259, 15043],
        [1678, 15043],
    ]
    rng, itself = random.Random(0), sentencepiece.SentencePieceProcessor(model_file=str(LLAMA))
    for _ in range(200):
        text = "".join(rng.choice(["  ", " ", "\n", rng.choice(rng.choice(ALPHABETS))]) for _ in range(20))
        assert llama.encode(text) == itself.encode(text)


# ---- control tokens --------

ADDED = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split()


def test_internvls_tokens_stand_on_placeholder_pieces_and_behind_them(intern):
    n = intern.n_text  # 92,544 in the real one
    assert (
        [intern.control[name] for name in ADDED] == list(range(n, n + 9))
        and intern.image == n + 2
        and intern.vocab_size == n + 9
    )
    assert intern.processor.id_to_piece(intern.control["<|im_end|>"]) == "[UNUSED_TOKEN_145]"
    assert intern.processor.id_to_piece(intern.control["<|im_start|>"]) == "[UNUSED_TOKEN_146]"
    assert (
        intern.pad == intern.eos
        and intern.piece(n + 2) == "<IMG_CONTEXT>"
        and intern.piece(intern.control["<|im_end|>"]) == "<|im_end|>"
    )
    for text in TEXTS + CONTROLS + ["a[UNUSED_TOKEN_145][[UNUSED_TOKEN_146]b"]:
        ids = intern.encode(text)
        assert ids == intern.encode(text, dummy_prefix=False) and not {*ids} & {*intern.control.values()}
        assert intern.decode([intern.bos, *ids, intern.control["<|im_end|>"], n + 2]) == text


def with_files(folder, tmp_path, **files):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return Tokenizer(tmp_path)


def test_the_files_beside_a_tokenizer_name_its_control_tokens(folder, tmp_path):
    n = Tokenizer(folder).n_text
    decoder = {
        str(n + 4): {"content": "<|im_end|>", "special": True},
        "7": {"content": "hello", "special": False},
        "1": {"content": "<s>", "special": True},
    }
    tok = with_files(
        folder,
        tmp_path,
        added_tokens={"<IMG_CONTEXT>": n + 6, "<|im_start|>": n + 3},
        tokenizer_config={"added_tokens_decoder": decoder},
    )
    assert tok.control == {
        "<s>": 1,
        "</s>": 2,
        "<IMG_CONTEXT>": n + 6,
        "<|im_start|>": n + 3,
        "<|im_end|>": n + 4,
    }
    assert tok.image == n + 6 and max(tok.names) == n + 6


def test_llama_hf_llava_and_prismatic_number_their_tokens_each_in_its_way(llama, tmp_path):
    assert (llama.image, llama.pad, llama.vocab_size) == (32000, 32001, 32064)
    decoder = {
        str(i): {"content": content, "special": True} for i, content in enumerate(("<unk>", "<s>", "</s>"))
    }
    for name, files, image, pad in [
        ("bare", {"tokenizer_config": {"legacy": True, "added_tokens_decoder": decoder}}, 32000, 32001),
        ("llava-hf", {"added_tokens": {"<image>": 32000, "<pad>": 32001}}, 32000, 32001),
        ("prismatic", {"config": {"model": {"llm_backbone_id": "vicuna-v15-7b"}}}, 32001, 32000),
        ("prismatic-hf", {"added_tokens": {"<PAD>": 32000}}, 32001, 32000),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / "tokenizer.model").write_bytes(LLAMA.read_bytes())
        tok = with_files(tmp_path, tmp_path / name, **files)
        assert (tok.image, tok.pad, tok.n_text, tok.vocab_size) == (image, pad, 32000, 32064)
        assert tok.encode("<unk><s> USER: x") == llama.encode(
            "<unk><s> USER: x"
        )  # the files change no id of a text


@pytest.mark.parametrize(
    "files, message",
    [
        ({"added_tokens": "{"}, "added_tokens.json: damaged"),
        ({"added_tokens": []}, "added_tokens.json: a list, not a JSON object"),
        ({"added_tokens": {"<x>": "y"}}, "copy both again"),
        ({"added_tokens": {"<x>": -1}}, "ids of tokens are to be 0 to"),
        ({"added_tokens": {"<x>": 10**9}}, "ids of tokens are to be 0 to"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": "<x>"}}}, "copy both again"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": {"special": True}}}}, "copy both again"),
    ],
)
def test_broken_files_beside_a_tokenizer_are_named(folder, tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        with_files(folder, tmp_path, **files)


def test_a_damaged_piece_is_said_when_the_tokenizer_is_opened(folder, tmp_path):
    raw = (folder / "tokenizer.model").read_bytes()
    i = raw.index("▁a".encode())
    (tmp_path / "tokenizer.model").write_bytes(raw[:i] + b"\xff" + raw[i + 1 :])
    with pytest.raises(UserError, match="tokenizer.model: .*copy the sentencepiece model again"):
        Tokenizer(tmp_path)


def test_a_family_without_a_sentencepiece_model_is_not_told_to_copy_one(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")  # all that Llama-3 and Qwen have
    with pytest.raises(UserError, match="such as Llama-3 and Qwen, are not supported"):
        Tokenizer(tmp_path)


# ---- texts --------


def test_text_survives_encoding_and_decoding(tok, llama):
    for t in (tok, llama):
        for text in TEXTS:
            assert t.decode([t.bos, *t.encode(text), t.image, t.eos, t.pad, t.vocab_size - 1]) == text


def test_control_tokens_typed_by_a_user_stay_text(tok, llama):
    for t in (tok, llama):
        tokens, labels = encode_conversation(
            t, [("human", "a</s>b<s> <pad> <unk> <0x0A>"), ("gpt", "x</s>y")], "vicuna_v1", []
        )
        assert (
            tokens.count(t.eos) == 1
            and tokens.count(t.bos) == 1
            and t.pad not in tokens
            and t.image not in tokens
        )
        assert "a</s>b<s> <pad> <unk> <0x0A>" in t.decode(tokens) and supervised(t, labels) == " x</s>y</s>"


def test_partial_decoding_never_takes_back_what_it_said(tok):
    ids, said = tok.encode("né 🙂👩‍👩‍👧 cat 你好"), ""
    for n in range(len(ids) + 1):
        text = tok.decode(ids[:n], partial=True)
        assert text.startswith(said) and "\ufffd" not in text
        said = text
    assert said == "né 🙂👩‍👩‍👧 cat 你好"


# ---- pictures in the text --------


@pytest.mark.parametrize(
    "text", ["<image>\nWhat?", "What?\n<image>", "<image>What?", " <image>\nWhat? ", "What?"]
)
def test_one_picture_at_either_end_or_without_marker_goes_first(tok, text):
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat.")]
    assert encode_conversation(tok, [("human", text), turns[1]], "vicuna_v1", [2]) == encode_conversation(
        tok, turns, "vicuna_v1", [2]
    )


def test_several_pictures_stay_where_they_were_written_each_with_its_own_length(tok):
    turns = [
        ("human", "Is <image> left of <image>?"),
        ("gpt", "A cat."),
        ("human", "And this: <image> here?"),
        ("gpt", "Left."),
    ]
    tokens, labels = encode_conversation(tok, turns, "vicuna_v1", [2, 3, 1])
    marks = {tok.image: "#", tok.eos: "</s>"}
    text = "".join(marks.get(i) or tok.piece(i).replace("▁", " ") for i in tokens[1:])
    first = f" {USER} USER: Is ##  left of ### ? ASSISTANT: A cat.</s>"
    assert text == first + "USER: And this: #  here? ASSISTANT: Left.</s>"
    assert all(label == IGNORE for token, label in zip(tokens, labels) if token == tok.image)


def test_without_a_picture_the_word_image_in_brackets_is_text(tok):
    turns = [("human", "What does <image> mean?"), ("gpt", "In HTML <image> is no tag.")]
    tokens, labels = encode_conversation(tok, turns, "vicuna_v1", [])
    assert written_out(tok, tokens, labels).endswith(
        " USER: What does <image> mean? ASSISTANT:« In HTML <image> is no tag.</s>»"
    )
    assert tok.image not in tokens


def test_internvl_leaves_a_picture_where_it_was_written_and_only_its_older_template_strips(intern):
    turns = [("human", "And <image> \n"), ("gpt", " x ")]
    assert "user\nAnd <img><image></img> \n<|im_end|>" in written_out(
        intern, *encode_conversation(intern, turns, "internvl2_5", [2])
    )
    assert "user\nAnd <img><image></img><|im_end|><|im_start|>assistant\n«x<|im_end|>»" in written_out(
        intern, *encode_conversation(intern, turns, "internlm2-chat", [2])
    )
    turns = [("human", "What?"), turns[1]]
    assert "user\n<img><image></img>\nWhat?<|im_end|>" in written_out(
        intern, *encode_conversation(intern, turns, "internvl2_5", [1])
    )


@pytest.mark.parametrize(
    "turns, n_visual, message",
    [
        ([("human", "<image> <image>"), ("gpt", "x")], [4], "2 <image> for 1 pictures;"),
        ([("human", "Which?"), ("gpt", "x")], [4, 4], "0 <image> for 2 pictures"),
        ([("human", "Draw."), ("gpt", "<image>")], [4], "answer in turn 2 holds <image>"),
        ([("human", "What?"), ("gpt", " \n")], [], "answer in turn 2 is empty"),
        ([("human", "What?"), ("human", "What?"), ("gpt", "x")], [], "turn 2 is from 'human'"),
        ([("human", "What?")], [], "no answer to learn from"),
        ([("gpt", "Hi.")], [], "no answer to learn from"),
    ],
)
def test_a_conversation_that_does_not_add_up_is_an_error(tok, turns, n_visual, message):
    with pytest.raises(UserError, match=message):
        encode_conversation(tok, turns, "vicuna_v1", n_visual)


def test_plain_wants_one_picture_and_one_caption(tok):
    with pytest.raises(UserError, match="needs a picture"):
        encode_conversation(tok, [("human", "x"), ("gpt", "y")], "plain", [])
    with pytest.raises(UserError, match="one question and one answer"):
        encode_conversation(tok, [("human", "x"), ("gpt", "y")] * 2, "plain", [1])


def test_an_unknown_template_names_its_nearest_match(tok):
    with pytest.raises(UserError, match="did you mean vicuna_v1"):
        encode_conversation(tok, [("human", "x"), ("gpt", "y")], "vicuna-v1", [])


def test_a_missing_a_broken_and_a_space_eating_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.*no tokenizer there"):
        Tokenizer(tmp_path / "nowhere")
    for raw in (b"", b"hello"):
        (tmp_path / "tokenizer.model").write_bytes(raw)
        with pytest.raises(UserError, match="tokenizer.model: .*copy the sentencepiece model again"):
            Tokenizer(tmp_path)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words"] * 9),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="does not keep spaces"):
        Tokenizer(tmp_path)


def test_a_tokenizer_of_the_records_own_words_has_each_as_one_token_and_the_same_file_each_time(
    tmp_path, capsys
):
    file = write(
        tmp_path / "a.json",
        [
            record(i, f"<image>\nWhere is the {kind}?\nOne word, please.", place)
            for i, (kind, place) in enumerate(
                zip(["airplane", "frog", "truck"] * 20, ["left", "right", "under the bridge"] * 20)
            )
        ],
    )
    for out in "one", "two":
        assert (
            tools_show.main(["tokenizer", str(file), "--vocab-size", "340", "--out", str(tmp_path / out)])
            == 0
        )
    assert "340 tokens" in (said := capsys.readouterr().out) and "100.0%" in said
    assert (tmp_path / "one/tokenizer.model").read_bytes() == (tmp_path / "two/tokenizer.model").read_bytes()
    tok = Tokenizer(tmp_path / "one")
    assert [len(tok.encode(word)) for word in ("airplane", "frog", "bridge", "under the bridge")] == [
        1,
        1,
        1,
        3,
    ]
    assert tok.decode(tok.encode("a word it never met:\n  \u732b")) == "a word it never met:\n  \u732b"


@pytest.mark.parametrize(
    "size, says",
    [
        (-1, "--vocab-size -1: must be at least 260"),
        (262, "262 tokens .*smaller"),
        (3 * 10**9, "3000000000 tokens"),
    ],
)
def test_a_tokenizer_too_small_for_its_texts_or_too_large_for_any_is_refused_with_the_bound(
    tmp_path, size, says
):
    file = write(tmp_path / "a.json", [record(0)])
    with pytest.raises(UserError, match=says):
        tools_show.main(["tokenizer", str(file), "--vocab-size", str(size), "--out", str(tmp_path)])
    assert not (tmp_path / "tokenizer.model").exists()


def test_a_tokenizer_of_few_words_has_as_many_tokens_as_there_are(tmp_path, capsys):
    file = write(tmp_path / "a.json", [record(0)])
    assert tools_show.main(["tokenizer", str(file), "--vocab-size", "9000", "--out", str(tmp_path)]) == 0
    n = Tokenizer(tmp_path).n_text
    assert 260 <= n < 9000
    assert f"tokenizer.model: {n} tokens; " in capsys.readouterr().out


def test_a_tokenizer_that_cannot_be_written_is_one_line(tmp_path):
    file = write(tmp_path / "a.json", [record(0)])
    with pytest.raises(UserError, match="a.json: this folder cannot be made .*--out"):
        tools_show.main(["tokenizer", str(file), "--vocab-size", "275", "--out", str(file)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="a model is there"):
        tools_show.main(["tokenizer", str(file), "--out", str(tmp_path)])
    file = write(tmp_path / "b.json", [record(0, "<image>", " ")])
    with pytest.raises(UserError, match="they hold no words"):
        tools_show.main(["tokenizer", str(file), "--out", str(tmp_path / "new")])


# ---- files --------


def record(i, question="<image>\nWhat?", answer="A cat.", image="a.png"):
    return {
        "id": f"r{i}",
        "image": image,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


def write(path, records):
    """A .json file gets a list, a .jsonl file lines."""
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text(
        "[\n" + ",\n".join(lines) + "\n]\n" if path.suffix == ".json" else "\n".join(lines) + "\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def pictures(tmp_path):
    """An image root with a red and a blue picture, wide and high."""
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (40, 20), "red").save(root / "a.png")
    Image.new("RGB", (20, 40), "blue").save(root / "b.png")
    return root


def conversations(records):
    return [(r["id"], r["images"], r["turns"]) for r in records]


def test_a_list_and_lines_give_the_same_records(tmp_path):
    texts = [text.replace("<image>", "") for text in TEXTS]
    records = [record(i, f'<image>\n{texts[i % len(texts)]} [{{"}}]\u2028') for i in range(40)]
    a, b = Records(write(tmp_path / "a.json", records)), Records(write(tmp_path / "a.jsonl", records))
    (tmp_path / "dense.json").write_text(
        "\ufeff" + json.dumps(records)
    )  # one line, escapes, a byte order mark
    c = Records(tmp_path / "dense.json")
    assert len(a) == len(b) == len(c) == 40 and conversations(a) == conversations(b) == conversations(c)
    assert a[7]["turns"] == [("human", records[7]["conversations"][0]["value"]), ("gpt", "A cat.")] and a[7][
        "images"
    ] == ["a.png"]


def test_records_longer_than_the_window_are_found(tmp_path):
    records = [record(0, "é" * 3_000_000), record(1), record(2, "x" * 1_100_000)]
    assert [len(r["turns"][0][1]) for r in Records(write(tmp_path / "a.json", records))] == [
        3_000_000,
        13,
        1_100_000,
    ]


def test_a_question_file_becomes_one_pair_of_turns_and_keeps_its_fields(tmp_path):
    lines = [
        {"question_id": 7, "image": "a.png", "text": "What?", "answer": "cat", "category": "kind"},
        {"question_id": 8, "text": "Why?"},
    ]
    records = Records(write(tmp_path / "q.jsonl", lines))
    assert (
        records[0]["turns"] == [("human", "What?"), ("gpt", "cat")]
        and records[0]["category"] == "kind"
        and records[0]["id"] == "7"
    )
    assert records[1]["turns"] == [("human", "Why?")] and records[1]["images"] == []


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", "", "holds no record"),
        ("a.json", "[]", "holds no record"),
        (
            "a.json",
            '[{"id": 1}, {"id": 2',
            "a.json: damaged or of another kind .*Expecting ',' delimiter: line 1 column",
        ),
        ("a.json", '[{"id": 1}', "a.json: damaged .*column 11"),
        ("a.json", '[{"id": 1} {"id": 2}]', "a.json: damaged .*column 12"),
        ("a.json", '[{"id": 1}] more', "Extra data: line 1 column 13"),
        ("a.json", '["text"]', 'a.json, record 0: .* expected {"id", "image", "conversations"'),
        (
            "a.json",
            '{"id": 1, "data": []}',
            "a.json, line 1 .id '1'.: .*no conversation.* or a question in \"text\"",
        ),
        ("a.json", '{\n"id": 1}', "a.json, line 1: damaged"),
        ("a.jsonl", '\n{"id": "x", "conv', "a.jsonl, line 2: damaged"),
        ("a.jsonl", "3\n", "line 1: .*expected {"),
        ("a.jsonl", '{"id": "x"}', "line 1 .id 'x'.: "),
        ("a.jsonl", '{"id": "x", "conversations": []}', "line 1 .id 'x'.: .*no conversation"),
        (
            "a.jsonl",
            '{"id": "x", "conversations": [{"from": "human", "value": 3}]}',
            "id 'x'.: .*turn 1 is 3 from 'human'",
        ),
        (
            "a.jsonl",
            '{"id": "x", "conversations": [{"from": "user", "value": "3"}]}',
            "turn 1 is '3' from 'user'",
        ),
        ("a.jsonl", '{"id": "x", "conversations": ["hi"]}', "id 'x'.: .*expected {"),
        ("a.jsonl", '{"id": "x", "image": 3, "text": "hi"}', '"image" is 3'),
        ("a.jsonl", '{"id": "x", "text": "what", "answer": ["a"]}', "\"answer\" is \\['a'\\]"),
        ("a.jsonl", '{"id": "x", "image": "a.png", "images": ["b.png"], "text": "?"}', "different pictures"),
        ("a.jsonl", '{"id": "x", "image_path": "a.png", "text": "?"}', '"image_path" is not read.*"image"'),
        ("a.jsonl", '{"id": "x", "image": "a.png", "video": "a.mp4", "text": "?"}', '"video" is not read'),
        ("a.jsonl", '{"id": "x", "text": "<image>\\nWhat?"}', "1 <image> for 0 pictures; name each in"),
        ("a.jsonl", '{"id": "x", "images": ["a.png"], "text": "<image><image>"}', "2 <image> for 1 picture"),
        ("a.jsonl", "[" * 100_000, "a.jsonl: damaged .*RecursionError"),
        ("a.jsonl", '{"a":' * 100_000, "a.jsonl, line 1: damaged .*RecursionError"),
    ],
)
def test_a_broken_file_is_one_error_that_names_the_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        list(Records(tmp_path / name))


def test_images_is_read_like_image_and_both_may_say_the_same(tmp_path):
    lines = [
        {"images": ["a.png"], "text": "<image>?"},
        {"images": ["a.png"], "image": "a.png", "video": None, "image_id": 3, "text": "?"},
        {"image": "a.png", "image_url": "where it came from", "text": "?"},
        {"image": None, "images": [], "text": "?"},
    ]
    assert [r["images"] for r in Records(write(tmp_path / "a.jsonl", lines))] == [["a.png"]] * 3 + [[]]


NAMES_OF_PICTURES = """file_name filename fileName image_file_name image_filename imagePath image_list
    image_base64 image_bytes image_src image1 image_0 img_src media media_path frames visual pictures
    photo_urls""".split()


@pytest.mark.parametrize("name", NAMES_OF_PICTURES)
def test_a_picture_in_a_field_that_nobody_reads_is_refused_unless_it_is_empty_or_beside_image(tmp_path, name):
    nothing, no_names, twice = {name: None}, {name: []}, {"image": "a.png", name: "a.png"}
    lines = [{"text": "?"} | more for more in (nothing, no_names, twice)]
    assert len(list(Records(write(tmp_path / "a.jsonl", lines)))) == 3
    with pytest.raises(UserError, match=f'line 1 .*"{name}" is not read; name pictures in "image"'):
        list(Records(write(tmp_path / "b.jsonl", [{"text": "?", name: "a.png"}])))


def test_what_a_text_says_of_itself_is_no_picture(tmp_path):
    names = "file path url source framework timeframe media_type image_caption image_id visual_genome".split()
    lines = [{"text": "?", name: "x"} for name in names]
    assert not any(record["images"] for record in Records(write(tmp_path / "a.jsonl", lines)))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_text_that_is_not_utf_8_is_called_so(tmp_path, encoding):
    (tmp_path / "a.json").write_text(json.dumps([record(0)]), encoding=encoding)
    with pytest.raises(UserError, match="a.json: .*UTF-16.*give a file of UTF-8 text"):
        Records(tmp_path / "a.json")


def test_a_folder_and_a_pipe_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path, why in (tmp_path, "Is a directory"), (tmp_path / "pipe.json", "a named pipe or a device"):
        with pytest.raises(UserError, match=f"{path.name}: cannot be read .{why}"):
            Records(path)


def test_a_file_is_named_although_its_name_stands_in_the_error_by_chance():
    with pytest.raises(UserError, match="^clip: only clip_vision is"), reading("clip"):
        raise UserError("only clip_vision is implemented")


def all_rows(path):
    return list(read_rows(path))


@pytest.mark.parametrize("read", [read_json, load_records, open_weights, read_sentencepiece, all_rows])
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: cannot be read .a named pipe"):
        read(tmp_path / "pipe")


def test_pictures_lie_beside_their_own_file_where_no_root_is_given(tmp_path):
    for name in "one", "two":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.json", [record(0)])
    records = Records(f"{tmp_path}/one/a.json,{tmp_path}/two/a.json")
    assert [picture_paths(r) for r in records] == [[tmp_path / name / "a.png"] for name in ("one", "two")]


@pytest.mark.parametrize("weight", ["nan", "1e9", "0", "-1"])
def test_an_absurd_weight_is_refused(tmp_path, weight):
    file = write(tmp_path / "a.json", [record(0)])
    with pytest.raises(UserError, match="a.json: a weight of .*; give more than 0, at most 1000"):
        Records(file, weights=weight)
    entry = {"annotation": "a.json", "repeat_time": float(weight)}
    (tmp_path / "meta.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(UserError, match="a weight of"):
        Records(tmp_path / "meta.json")


@pytest.mark.parametrize("entry", [
    {"annotation": 3}, {"root": "."}, 5, {"annotation": "a.json", "repeat_time": []},
])
def test_a_damaged_entry_of_meta_json_is_named(tmp_path, entry):
    write(tmp_path / "a.json", [record(0)])
    (tmp_path / "meta.json").write_text(json.dumps({"x": entry, "y": {"annotation": "a.json"}}))
    with pytest.raises(UserError, match="meta.json, 'x': .*write your own paths there"):
        Records(tmp_path / "meta.json")


def test_a_missing_file_and_a_missing_image_root_are_errors(tmp_path):
    with pytest.raises(UserError, match="nowhere.json: cannot be read"):
        Records(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="--image-root .*nowhere: no such folder"):
        Records(write(tmp_path / "a.json", [record(0)]), tmp_path / "nowhere")


def test_a_record_costs_a_few_bytes_of_memory(tmp_path):
    (tmp_path / "a.jsonl").write_text((json.dumps(record(0)) + "\n") * 200_000)
    (tmp_path / "a.json").write_text("[" + ",".join([json.dumps(record(0))] * 20_000) + "]")
    for name in ("a.jsonl", "a.json"):
        tracemalloc.start()
        records = Records(tmp_path / name)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        kept_as_bytes = 0 if name == "a.jsonl" else len(json.dumps(record(0)))
        assert held / len(records) < 60 + kept_as_bytes


def test_no_name_climbs_out_of_the_image_root_but_a_link_in_it_may_lead_anywhere(tmp_path, pictures):
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (tmp_path / "coco").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "coco" / "c.png")
    (pictures / "coco").symlink_to(tmp_path / "coco")
    (tmp_path / "linked").symlink_to(pictures)
    file = Records(write(tmp_path / "a.json", [record(0)]), tmp_path / "linked").files[0]
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "x/../../secret.png",
        "coco/../../secret.png",
        "..",
    ):
        with pytest.raises(UserError, match="lies outside --image-root"):
            file.image_path(name)
    assert (
        file.image_path("b.png")
        == file.image_path(str(tmp_path / "linked" / "b.png"))
        == file.image_path("coco/../b.png")
    )
    for name in ("b.png", "coco/c.png", "coco/../b.png"):
        assert open_image(file.image_path(name)).mode == "RGB"
    for name in ("a\0b", "x" * 5000, "."):
        with pytest.raises(UserError):
            open_image(file.image_path(name))


# ---- examples and batches --------

CFG = VisionConfig(image_size=24, patch_size=12)  # 4 visual tokens a picture


def examples(path, pictures, tok, records, **change):
    options = {"template": "vicuna_v1", "vision_cfg": CFG, "image_mode": "pad", "max_length": 500, **change}
    return Examples(Records(write(path, records), pictures), tok, **options)


def test_an_example_holds_tokens_labels_and_pixels_that_agree(tmp_path, pictures, tok):
    e = examples(
        tmp_path / "a.json", pictures, tok, [record(0, "<image> or <image>?", image=["a.png", "b.png"])]
    )[0]
    assert e["tokens"].dtype == e["labels"].dtype == torch.int64 and e["tokens"].shape == e["labels"].shape
    assert e["pixels"].shape == (2, 3, 24, 24) and e["pixels"].dtype == torch.uint8
    assert (e["tokens"] == tok.image).sum() == 2 * CFG.n_token
    assert e["pixels"][:, :, 12, 12].tolist() == [[255, 0, 0], [0, 0, 255]] and e["id"] == "r0"


def test_a_batch_is_padded_on_the_right_and_its_padding_costs_nothing(tmp_path, pictures, tok):
    records = [
        record(0),
        record(1, "What?", "A red cat on a bus.", image=None),
        record(2, answer="Left.", image="b.png"),
    ]
    items = examples(tmp_path / "a.json", pictures, tok, records)
    batch = collate([items[0], items[1], items[2]], tok.pad)
    B, T = batch["tokens"].shape
    assert (
        B == 3
        and batch["labels"].shape == (B, T)
        and T == max(batch["lengths"])
        and batch["record_ids"] == ["r0", "r1", "r2"]
    )
    for row, n in enumerate(batch["lengths"]):
        assert torch.equal(batch["tokens"][row, :n], items[row]["tokens"]) and torch.equal(
            batch["labels"][row, :n], items[row]["labels"]
        )
        assert (batch["tokens"][row, n:] == tok.pad).all() and (batch["labels"][row, n:] == IGNORE).all()
    assert torch.equal(
        batch["pixels"], torch.cat([items[0]["pixels"], items[2]["pixels"]])
    )  # the text row has none


def test_a_batch_of_text_alone_has_no_pixels(tmp_path, tok):
    items = examples(tmp_path / "a.json", None, tok, [record(0, "What?", image=None)])
    assert collate([items[0]], tok.pad)["pixels"].shape == (0, 3, 24, 24)


BAD = [
    record(0),
    record(1, image="gone.png"),
    record(2, "word " * 600),
    record(3, answer=""),
    record(4, "<image><image>"),
]
WHY = [
    "gone.png: no such picture.*--image-root",
    "500 allowed",
    "answer in turn 2 is empty",
    "2 <image> for 1 picture",
]


def test_a_record_that_cannot_be_used_whole_stops_the_program_by_name(tmp_path, pictures, tok):
    items = examples(tmp_path / "a.json", pictures, tok, BAD)
    for i, why in enumerate(WHY, 1):
        with pytest.raises(UserError, match=rf"a.json, record {i} \(id 'r{i}'\): .*{why}"):
            items.make_example(items.records[i])


def test_where_bad_records_are_skipped_each_is_counted_with_its_reason(tmp_path, pictures, tok):
    items = examples(tmp_path / "a.json", pictures, tok, BAD)
    batch = collate([items[i] for i in range(5)], tok.pad)
    assert batch["record_ids"] == ["r0"] and len(batch["tokens"]) == 1 and len(batch["skipped"]) == 4
    assert "gone.png" in batch["skipped"][0]
    assert collate([items[1]], tok.pad)["tokens"].shape == (0, 0)


def test_an_augmented_tile_is_a_large_part_of_itself_and_half_are_mirrored():
    brighter_to_the_right = torch.arange(40, 240, 2, dtype=torch.uint8)
    ramp = brighter_to_the_right.expand(200, 3, 100, 100).clone()
    torch.manual_seed(0)
    augment(ramp)
    rise = ramp[:, 0, 50].int().diff()
    mirrored = (rise <= 0).all(1)
    assert ((rise >= 0).all(1) | mirrored).all() and 70 < mirrored.sum() < 130
    low, high = ramp.amin((1, 2, 3)).int(), ramp.amax((1, 2, 3)).int()
    assert low.min() == 40 and high.max() == 238 and (high - low).min() >= 146 and len(set(low.tolist())) > 20


# ---- programs --------


@pytest.fixture
def program(capfd):
    """program(FILE, ...) or program("check", FILE, ...) -> exit code, what it printed, what it complained of.
    """

    def program(*argv):
        code = support_cli.run_program(lambda: tools_show.main([str(word) for word in argv]))
        return code, *capfd.readouterr()

    return program


def test_show_prints_the_tokens_and_saves_the_tiles(tmp_path, pictures, folder, program):
    two = record(1, "<image> and <image>?", image=["a.png", "b.png"])
    file = write(tmp_path / "a.json", [record(0), two])
    out = tmp_path / "show.png"
    flags = ["--image_root", pictures, "--from-scratch", "--tokenizer", folder]
    code, text, _ = program(file, *flags, "--id", "r1", f"--out={out}")
    assert code == 0
    assert text.count("<image> x 64") == 2
    assert "128 of them visual" in text
    assert "</s>" in text

    shown = Image.open(out)  # one below the other, beside each row its positions; four times as large
    assert shown.size == (4 * (96 + 60), 4 * 2 * 96)
    assert shown.getpixel((4 * 48, 4 * 48)) == (255, 0, 0)
    assert shown.getpixel((4 * 48, 4 * 144)) == (0, 0, 255)


def test_show_takes_what_training_would_take(tmp_path, pictures, tok, program):
    file = write(pictures / "a.json", [record(0)])
    model = save(VLM(tiny_config(tok, template="llava_v0", image_mode="crop")), tok, tmp_path / "model")
    flags = ["--model", model, f"--out={tmp_path / 'show.png'}"]
    code, text, _ = program(file, *flags)  # the pictures lie beside the file
    assert code == 0
    assert "template llava_v0, pictures 32 px in patches of 8 px, mode crop" in text
    _, text, _ = program(file, *flags, "--stage", "pretrain", "--image-mode", "pad")
    assert "template plain, pictures 32 px in patches of 8 px, mode pad" in text
    code, text, _ = program(file, "--model", "llava-1.5-7b", f"--out={tmp_path / 'show.png'}")
    assert code == 0
    assert "template vicuna_v1, pictures 336 px in patches of 14 px, mode pad" in text
    _, _, err = program(file, *flags, "--template", "internvl2.5")
    assert "did you mean internvl2_5?" in err
    with pytest.raises(SystemExit) as ended:
        program("--help")
    assert ended.value.code == 0


CHECK = ("--from-scratch", "--tokenizer")


def test_check_of_good_records_exits_with_0(tmp_path, pictures, folder, program):
    file = write(tmp_path / "a.jsonl", [record(0), record(0), record(1, "Why?", image=None)])
    code, text, _ = program("check", file, "--image-root", pictures, *CHECK, folder)
    assert code == 0
    assert "3 records read, 3 good, 0 wrong" in text
    assert "0: 1 records, 1: 2 records" in text


def test_check_names_what_is_wrong_and_exits_with_1(tmp_path, pictures, folder, program):
    (pictures / "torn.png").write_bytes((pictures / "a.png").read_bytes()[:50])
    file = write(tmp_path / "a.jsonl", BAD + [record(5, image="torn.png"), 3])
    code, out, err = program("check", file, "--image-root", pictures, *CHECK, folder, "--workers", 1)
    assert code == 1
    assert "7 records read, 1 good, 6 wrong" in out
    assert "(id 'r5')" in out


def test_one_line_of_check_stands_for_many_equal_faults(tmp_path, pictures, folder, program):
    missing = [record(i, image=f"{i}.png") for i in range(20)]
    file = write(pictures / "a.jsonl", [*missing, record(20, "<image><image>")])
    _, out, _ = program("check", file, *CHECK, folder)
    wrong = [line for line in out.splitlines() if line.startswith("wrong: ")]
    assert len(wrong) == 2
    assert "line 1 (id 'r0')" in wrong[0]
    assert wrong[0].endswith("(and 19 more of this kind)")


def test_check_takes_what_training_takes(tmp_path, pictures, folder, program):
    """Several files, MMPR's meta.json, and pairs, which need both of their answers."""
    pair = {"id": "p", "image": "a.png", "question": "<image>\nWhat?"}
    pair |= {"chosen": "A cat.", "rejected": "A dog."}
    conversations = write(pictures / "a.json", [record(0)])
    pairs = write(pictures / "b.jsonl", [pair, pair | {"rejected": None}])
    code, out, _ = program("check", f"{conversations},{pairs}", *CHECK, folder)
    assert code == 1
    assert "3 records read, 2 good, 1 wrong" in out
    assert "a pair has all three as text" in out
    meta = pictures / "meta.json"
    meta.write_text(json.dumps({"one": {"root": "", "annotation": "a.json", "repeat_time": 2}}))
    code, out, _ = program("check", meta, *CHECK, folder)
    assert code == 0
    assert "2 records read, 2 good" in out


def test_programs_say_what_is_wrong_in_one_line(tmp_path, pictures, folder, program, capfd):
    file = write(tmp_path / "a.json", [record(0, image="gone.png")])
    code, _, err = program(file, "--image-root", pictures, *CHECK, folder)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and "gone.png" in err
    code, _, err = program("check", file, "--image_rot", pictures)
    assert code == 1 and "unknown argument --image-rot; did you mean --image-root?" in err


def test_an_error_in_a_loader_process_is_still_one_line(tmp_path, tok, pictures, capsys):
    items = examples(tmp_path / "a.json", pictures, tok, BAD)

    def program():
        try:
            items.make_example(items.records[1])
        except UserError:
            # what a loader process does with an error: sends it over with its traceback in the text
            torch._utils.ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    assert support_cli.run_program(program) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / 'a.json'}, record 1 (id 'r1'): ") and err.count("\n") == 1


def test_the_photo_questions_are_whole(llama, capsys):
    if not PHOTOS.exists():
        pytest.skip(f"needs {PHOTOS}")
    argv = ["--image-root", str(PHOTOS), *CHECK, str(LLAMA), "--limit", "20"]
    assert (
        tools_show.main(["check", str(PHOTOS / "train.json"), *argv]) == 0
        and tools_show.main(["check", str(PHOTOS / "val.jsonl"), *argv]) == 0
    )
    assert "20 good, 0 wrong" in capsys.readouterr().out


def test_the_questions_of_one_record_share_its_tiles_and_cost_what_they_cost_alone(
    tmp_path, pictures, tok, monkeypatch
):
    talk = [
        {"from": who, "value": text}
        for k in range(3)
        for who, text in (
            ("human", f"<image>\nQuestion {k}?" if k == 0 else f"Question {k}?"),
            ("gpt", "Yes."),
        )
    ]
    (tmp_path / "x.json").write_text(
        json.dumps([{"id": name, "image": f"{name}.png", "conversations": talk} for name in "ab"])
    )
    vlm = VLM(
        VLMConfig(
            VisionConfig(image_size=32, patch_size=8, n_embd=32, n_layer=2, n_head=2, n_hidden=64),
            DecoderConfig(
                vocab_size=tok.vocab_size,
                n_layer=2,
                n_head=2,
                n_kv_head=2,
                n_embd=32,
                head_dim=16,
                n_hidden=64,
            ),
            image_token=tok.image,
        )
    )
    items = Examples(
        Records(tmp_path / "x.json", pictures).split_questions(), tok, "vicuna_v1", vlm.cfg.vision, "pad", 256
    )
    opened = []
    monkeypatch.setattr(items, "open_picture", lambda path, record: opened.append(path) or open_image(path))
    rows = [items[i] for i in (0, 1, 2, 5, 3)]
    assert [path.name for path in opened] == ["a.png", "b.png"]
    assert not rows[2]["pixels"].equal(rows[3]["pixels"])
    batch = collate(rows, tok.pad)
    assert batch["pixels"].shape == (2, 3, 32, 32) and batch["layout"][:, 0].tolist() == [0] * 48 + [1] * 32
    together = vlm(batch["tokens"], batch["pixels"], layout=batch["layout"])
    for row, e in zip(together, rows):
        alone = collate([e], tok.pad)
        assert_close(
            row[: len(e["tokens"])], vlm(alone["tokens"], alone["pixels"], layout=alone["layout"])[0]
        )


def test_split_questions_makes_of_every_question_a_record_with_the_pictures_up_to_it(tmp_path, tok):
    turn = lambda who, text: {"from": who, "value": text}
    talk = [
        turn("human", "<image>\nWhat?"),
        turn("gpt", "A cat."),
        turn("human", "Why?\n<image>"),
        turn("gpt", "Fur."),
        turn("human", "And?"),
        turn("gpt", "So."),
    ]
    lines = [
        {"id": "a", "image": ["1.png", "2.png"], "conversations": talk},
        {"id": "b", "conversations": talk[4:]},
        {"id": "c"},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = Records(tmp_path / "x.jsonl", tmp_path).split_questions()
    assert len(records) == 3 + 1 + 1 and records.group_sizes.tolist() == [3, 1, 1]
    assert [records[i]["turns"] for i in range(4)] == [
        [("human", "<image>\nWhat?"), ("gpt", "A cat.")],
        [("human", "<image>\nWhy?\n<image>"), ("gpt", "Fur.")],
        [("human", "<image>\n<image>\nAnd?"), ("gpt", "So.")],
        [("human", "And?"), ("gpt", "So.")],
    ]
    assert [records[i]["images"] for i in range(4)] == [["1.png"], ["1.png", "2.png"], ["1.png", "2.png"], []]
    assert records[2]["where"] == f"{tmp_path / 'x.jsonl'}, line 1 (id 'a'), question 3"
    with pytest.raises(UserError, match="line 3.*no conversation"):
        records[4]
    with pytest.raises(IndexError):
        records[5]


def test_a_question_may_keep_the_turns_before_it_and_an_answer_first_is_no_question(tmp_path):
    turns = [
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "And <image>?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Why?"},
    ]
    line = {"id": "a", "images": ["1.png", "2.png"], "conversations": turns}
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    records = Records(tmp_path / "x.jsonl").split_questions(with_earlier=True)
    asked = [(turn["from"], turn["value"]) for turn in turns]
    assert [r["turns"] for r in records] == [asked[:3], asked[:5]]
    assert [r["images"] for r in records] == [["1.png"], ["1.png", "2.png"]]


def test_questions_of_a_record_that_see_more_and_more_pictures_are_one_batch(tmp_path, pictures, tok):
    talk = []
    for text in "What?", "<image>\nAnd?", "Now <image>?":
        talk += [{"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}]
    write(tmp_path / "a.json", [{"id": "a", "image": ["a.png", "b.png"], "conversations": talk}])
    records = Records(tmp_path / "a.json", pictures).split_questions()
    items = Examples(records, tok, "vicuna_v1", CFG, "pad", 500)
    batch = collate([items[i] for i in range(3)], tok.pad)
    assert [(row == tok.image).sum().item() for row in batch["tokens"]] == [0, 4, 8]
    seen = batch["pixels"][batch["layout"][:, 0], :, 12, 12]  # the colour in the middle of each token's tile
    assert seen.tolist() == [[255, 0, 0]] * 4 + [[255, 0, 0]] * 4 + [[0, 0, 255]] * 4


def test_a_held_out_question_is_asked_after_the_turns_before_it(tmp_path, pictures):
    talk = ["Hello.", "<image>\nWhat is it?", "Red.", "And <image>?", "Blue."]
    turns = [{"from": ("gpt", "human")[k % 2], "value": text} for k, text in enumerate(talk)]
    file = write(tmp_path / "v.json", [{"id": "v", "images": ["a.png", "b.png"], "conversations": turns}])
    first, second = eval.read_own(eval.EvalConfig(data=str(file), image_root=str(pictures)))
    assert (first["text"], first["truth"], len(first["image"])) == ("<image>\nWhat is it?", "Red.", 1)
    assert (second["text"], second["truth"], len(second["image"])) == ("And <image>?", "Blue.", 2)
    assert [text for _, text in second["earlier"]] == talk[:3]
