"""The public weights as a user meets them: true sizes without numbers, answers as of transformers."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import trained_tensors
from layouts import (
    LLAMA,
    PIXELS,
    TINY,
    clip_folder,
    close,
    count,
    internvl,
    lively,
    original,
    original_lora,
    prismatic,
    same,
    tr,
)
from PIL import Image
from test_data import intern  # noqa: F401 (a fixture)

import pairs
import sample
from conversation import Tokenizer, encode_prompt
from model import PRESETS, VLM, Connector, Decoder, DecoderConfig, VLMConfig
from sample import open_asked
from support.cli import UserError, run_program
from support.configs import decoder_config, vision_config
from support.export import TO_LLAVA, llava_config, save_adapter
from support.flags import ModelConfig
from support.lora import add_lora
from support.processor import save_processor
from support.weights import flatten, our_parts, rename
from tools.weights import main
from vision import VisionConfig, ViT

ASSETS = Path(__file__).parents[1] / "assets"


# ---- true sizes --------------------------------------------------------------------------------------------

LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
CLIP_L = LARGE | dict(intermediate_size=4096, patch_size=14, projection_dim=768)
SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27)
SO400M |= dict(num_attention_heads=16, patch_size=14)
CLIP, SIGLIP = (tr.CLIPVisionModel, tr.CLIPVisionConfig), (tr.SiglipVisionModel, tr.SiglipVisionConfig)
REGISTERS = tr.Dinov2WithRegistersModel, tr.Dinov2WithRegistersConfig
# Model and config as published, what their files hold beyond the tower, the published number (or in millions;
# of a SigLIP with its pooling head).
TOWERS = {
    "CLIP ViT-L/14-336": (*CLIP, CLIP_L | dict(image_size=336), "", 303_507_456),
    "CLIP ViT-L/14": (*CLIP, CLIP_L | dict(image_size=224), "", 303_179_776),
    "CLIP ViT-B/16": (*CLIP, dict(patch_size=16), "", 85_799_424),
    "SigLIP SO400M-384": (*SIGLIP, SO400M | dict(image_size=384), "head.", 428.2),
    "SigLIP base": (*SIGLIP, {}, "head.", 92.9),
    "DINOv2-L": (tr.Dinov2Model, tr.Dinov2Config, LARGE | dict(image_size=518), "mask_token", 304.4),
    "DINOv2-L with registers": (*REGISTERS, LARGE | dict(image_size=224, patch_size=14), "mask_token", 303.2),
    "ImageNet ViT-L/16": (tr.ViTModel, tr.ViTConfig, LARGE | dict(intermediate_size=4096), "pooler", 303.3),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_of_true_size_has_the_published_number_of_parameters(name):
    Model, Config, fields, extra, published = TOWERS[name]
    config = Config(**fields)
    with torch.device("meta"):
        theirs, ours = Model(config), ViT(vision_config(config.to_dict()))
    beyond = sum(p.numel() for name, p in theirs.named_parameters() if extra and extra in name)
    assert count(ours) + beyond == count(theirs)
    counted = count(theirs) if extra == "head." else count(ours)
    assert published == (counted if isinstance(published, int) else round(counted / 1e6, 1))


CONFIGS = list({Config.model_type: Config for _, Config, *_ in TOWERS.values()}.values())


@pytest.mark.parametrize("Config", CONFIGS)
def test_what_a_towers_config_leaves_out_means_the_defaults_of_its_class(Config):
    assert vision_config({"model_type": Config.model_type}) == vision_config(Config().to_dict())


@pytest.mark.parametrize("Config", [tr.LlamaConfig, tr.MistralConfig])
def test_what_a_decoders_config_leaves_out_means_the_defaults_of_its_class(Config):
    assert decoder_config({"model_type": Config.model_type}) == decoder_config(Config().to_dict())


THIRTEEN = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
TINYLLAMA = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4)
DECODERS = {
    "Llama-2-7B": (tr.LlamaConfig, {}, 6_738_415_616),
    "Llama-2-13B": (tr.LlamaConfig, THIRTEEN, 13_015_864_320),
    "TinyLlama": (tr.LlamaConfig, TINYLLAMA, 1_100_048_384),
    "Mistral-7B": (tr.MistralConfig, {}, 7_241_732_096),
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_of_true_size_has_the_published_number_of_parameters(name):
    Config, fields, published = DECODERS[name]
    with torch.device("meta"):
        assert count(Decoder(decoder_config(Config(**fields).to_dict()))) == published


CONNECTORS = [                       # kind, widths of the towers, width of the words, the published number
    ("fused_gelu", (1024, 1152), 4096, 71_385_600),                         # DINOv2 + SigLIP
    ("fused_gelu", (1024, 1152), 5120, 89_737_728),
    ("fused_gelu", (1024, 1024), 4096, 67_125_248),                         # DINOv2 + CLIP
    ("mlp2x_gelu", (1024,), 4096, 20_979_712),
    ("mlp2x_gelu", (1024,), 5120, 31_467_520),
    ("mlp2x_gelu", (1152,), 4096, 21_504_000),
]


@pytest.mark.parametrize("kind, widths, D, published", CONNECTORS)
def test_a_connector_of_true_size_has_the_published_number_of_parameters(kind, widths, D, published):
    towers = [VisionConfig(n_embd=width, n_layer=1, n_hidden=8) for width in widths]
    cfg = VLMConfig(towers[0], DecoderConfig(n_embd=D), kind, vision2=towers[1] if towers[1:] else None)
    with torch.device("meta"):
        assert count(Connector(cfg)) == published


INTERN_VIT = VisionConfig(
    448, 14, n_embd=1024, n_layer=24, n_head=16, n_hidden=4096, activation="gelu", norm_eps=1e-6,
    pre_norm=False, patch_bias=True, layer_scale=True, final_norm=False, merge=2,
)  # fmt: skip
INTERN_BIG = replace(INTERN_VIT, n_embd=3200, n_layer=45, n_head=25, n_hidden=12800, rms_norm=True)
INTERNLM2 = DecoderConfig(92553, n_layer=24, n_head=16, n_kv_head=8, n_embd=2048, head_dim=128, n_hidden=8192)
INTERNVL = {                         # tower, decoder, and the published numbers of tower, connector, whole
    "2B": (INTERN_VIT, INTERNLM2, 304_012_288, 12_595_200, 2_205_754_368),
    "8B": (
        INTERN_VIT,
        replace(INTERNLM2, n_layer=32, n_head=32, n_embd=4096, n_hidden=14336),
        304_012_288, 33_570_816, 8_075_365_376,
    ),  # fmt: skip
    "26B": (
        INTERN_BIG,
        replace(INTERNLM2, n_layer=48, n_head=48, n_embd=6144, n_hidden=16384),
        5_536_496_000, 116_429_824, 25_514_186_112,
    ),  # fmt: skip
}


@pytest.mark.parametrize("name", INTERNVL)
def test_internvl_of_true_size_has_the_published_number_of_parameters(name):
    vision, decoder, n_tower, n_connector, n_whole = INTERNVL[name]
    cfg = VLMConfig(vision, decoder, "norm_gelu", 92546, 2)
    with torch.device("meta"):
        vlm = VLM(cfg)
    assert (count(vlm.vision), count(vlm.connector), count(vlm)) == (n_tower, n_connector, n_whole)
    assert cfg.vision.n_token == 256


@pytest.mark.parametrize("name, dims, n", [("llava-1.5-7b", {}, 686), ("llava-1.5-13b", THIRTEEN, 758)])
def test_every_tensor_of_llava_at_its_true_size_finds_its_place(name, dims, n):
    text, vision = tr.LlamaConfig(vocab_size=32064, **dims), tr.CLIPVisionConfig(**CLIP_L, image_size=336)
    with torch.device("meta"):
        config = tr.LlavaConfig(vision_config=vision, text_config=text)
        theirs = tr.LlavaForConditionalGeneration(config).state_dict()
        ours = VLM(PRESETS[name]).state_dict()
    found = flatten(our_parts(theirs))
    assert len(found) == n
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in ours.items()}
    public = {rename(name, TO_LLAVA): t for name, t in ours.items()}
    assert flatten(our_parts(public)).keys() == ours.keys()


# ---- what transformers wrote, answered here as there -------------------------------------------------------

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PROCESSORS = {"crop": "CLIPImageProcessor", "pad": "LlavaImageProcessor"}


def toy(**changes):
    """A tiny LLaVA with the toy's tokenizer."""
    tok = Tokenizer(ASSETS / "toy-vicuna")
    vision = VisionConfig(56, 14, n_embd=32, n_layer=3, n_head=2, n_hidden=64)
    decoder = replace(TINY.decoder, vocab_size=tok.vocab_size, head_dim=16, block_size=512)
    cfg = VLMConfig(vision, decoder, image_token=tok.image, pad_token=tok.pad)
    return tok, lively(VLM(replace(cfg, **changes)))


def save_toy(folder, **changes):
    tok, vlm = toy(**changes)
    save_processor(folder, tok.path, vlm.cfg)
    vlm.save_pretrained(folder)
    return tok


def ask(folder, *flags):
    return run_program(lambda: sample.main(["--model", str(folder), *map(str, flags)]))


def as_transformers_writes(folder, mode, old=True):
    """A LLaVA directory in the words of transformers alone -> its model, its processor.

    old: the image processor's config has a file of its own, as on the hub, or where version 5 puts it.
    """
    tok, vlm = toy()
    save_processor(folder, tok.path, vlm.cfg)
    vlm.save_pretrained(folder)
    config = llava_config(vlm.cfg, "float32")
    for name in "image_aspect_ratio", "template":  # which transformers does not write
        del config[name]
    theirs = tr.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    theirs.config = tr.LlavaConfig(**config)
    sizes = dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    if mode == "pad":
        sizes["do_pad"] = True
    pictures = getattr(tr, PROCESSORS[mode])(**sizes)
    processor = tr.LlavaProcessor(
        pictures,
        tr.AutoTokenizer.from_pretrained(folder),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    for file in folder.glob("*.json"):
        file.unlink()
    theirs.save_pretrained(folder)
    processor.save_pretrained(folder)
    if old:
        pictures.save_pretrained(folder)
    return theirs, processor


@torch.no_grad()
@pytest.mark.parametrize("size", [(70, 70), (90, 50), (50, 90)], ids=["square", "wide", "high"])
@pytest.mark.parametrize("mode", PROCESSORS)
@pytest.mark.parametrize("old", [True, False], ids=["preprocessor_config", "processor_config"])
def test_sample_says_what_transformers_generates(tmp_path, capfd, monkeypatch, size, mode, old):
    theirs, processor = as_transformers_writes(tmp_path / "m", mode, old)
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    picture.save(tmp_path / "a.png")

    # Theirs. Of ids from <image> on none is ever said.
    text = f"{SYSTEM} USER: <image>\nWhat color is it? ASSISTANT:"
    inputs = processor(images=picture, text=text, return_tensors="pt")
    banned = list(range(theirs.config.image_token_index, theirs.config.text_config.vocab_size))
    ids = theirs.generate(**inputs, max_new_tokens=24, do_sample=False, suppress_tokens=banned)
    ids = ids[0, inputs["input_ids"].shape[1] :].tolist()

    # Ours.
    said, stream = [], VLM.stream

    def listen(*args, **choices):
        for new in stream(*args, **choices):
            said.append(int(new))
            yield new

    monkeypatch.setattr(VLM, "stream", listen)
    flags = ["--image", tmp_path / "a.png", "--prompt", "What color is it?", "--max-new-tokens", 24]
    assert ask(tmp_path / "m", *flags) == 0
    assert said == ids and len(said) == 24
    assert capfd.readouterr().out == Tokenizer(tmp_path / "m").decode(said).strip() + "\n"
    if size[0] != size[1]:                                                  # and --image-mode is heard
        assert ask(tmp_path / "m", *flags, "--image-mode", "pad" if mode == "crop" else "crop") == 0
        assert said[24:] != said[:24]


def test_info_says_why_a_directory_of_llava_hf_crops_and_what_pads(tmp_path, capsys):
    for mode in "crop", "pad":
        as_transformers_writes(tmp_path / mode, mode)
        capsys.readouterr()
        assert main(["info", str(tmp_path / mode)]) == 0
        said = capsys.readouterr().out
        assert f"px, mode {mode}" in said
        assert ("--image-mode pad" in said) == (mode == "crop")


# ---- what we write, opened by others -----------------------------------------------------------------------

ODD_WORDS = [
    "cat", "naïve", " two  spaces", "\n", "12,50 €", "你好", "🙂",
    "##", "C#", "\t", "", "USER:", "[INST]", "«",
]


def random_conversation(draw, pictures_later):
    """-> our turns and transformers' messages of one conversation, and how many pictures it has."""
    turns, messages, n_picture = [], [], 0
    for k in range(draw.choice([1, 1, 3, 5])):
        text = " ".join(draw.choices(ODD_WORDS, k=draw.randint(1, 6)))
        role, n = ("human", draw.choice([0, 1, 1, 2])) if k % 2 == 0 else ("gpt", 0)
        if role == "gpt" and not text.strip():
            text = "Yes."
        if k > 0 and not pictures_later:
            n = 0
        n_picture += n
        turns.append((role, "<image>" * n + "\n" * bool(n) + text))
        content = [{"type": "image"}] * n + [{"type": "text", "text": text}]
        messages.append({"role": "user" if role == "human" else "assistant", "content": content})
    return turns, messages, n_picture


CHATS = ["vicuna_v1", "llava_v1", "llava_llama_2", "mistral_instruct"]
CHATS += ["prism_pure", "prism_vicuna", "prism_llama_2", "prism_mistral"]


@pytest.mark.parametrize("template", CHATS)
def test_the_chat_template_gives_our_prompts_ids_for_500_conversations(tmp_path, template):
    tok = Tokenizer(LLAMA if LLAMA.exists() else ASSETS / "toy-vicuna")
    cfg = replace(TINY, image_token=tok.image, pad_token=tok.pad, template=template)
    save_processor(tmp_path, tok.path, cfg)
    (tmp_path / "config.json").write_text(json.dumps(llava_config(cfg, "float32")))
    theirs = tr.AutoTokenizer.from_pretrained(tmp_path)
    draw = random.Random(0)
    for _ in range(500):
        turns, messages, n = random_conversation(draw, pictures_later=draw.random() < 0.2)
        if n == 0 and draw.random() < 0.5:
            messages = [message | {"content": message["content"][-1]["text"]} for message in messages]
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert theirs(text)["input_ids"] == encode_prompt(tok, turns, template, [1] * n), turns


def test_where_the_ids_would_not_be_ours_transformers_finds_no_tokenizer(tmp_path, intern):
    for folder, tokenizer_file, template in (
        ("v0", toy()[0].path, "llava_v0"),
        ("intern", intern.path, "internvl2_5"),
    ):
        save_processor(tmp_path / folder, tokenizer_file, toy(template=template)[1].cfg)
        files = {path.name for path in (tmp_path / folder).iterdir()}
        assert files == {"tokenizer.model", "tokenizer_config.json"}


def test_transformers_pipeline_answers_as_we_do(tmp_path, capfd):
    save_toy(tmp_path / "m")
    Image.effect_noise((90, 50), 90).convert("RGB").save(tmp_path / "a.png")
    picture = {"type": "image", "path": str(tmp_path / "a.png")}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "What color is it?"}]}]
    pipe = tr.pipeline("image-text-to-text", model=str(tmp_path / "m"), device="cpu")
    greedy = {"max_new_tokens": 12, "do_sample": False}
    said = pipe(text=messages, generate_kwargs=greedy, return_full_text=False)
    flags = ["--image", tmp_path / "a.png", "--prompt", "What color is it?", "--max-new-tokens", 12]
    capfd.readouterr()
    assert ask(tmp_path / "m", *flags) == 0
    assert capfd.readouterr().out.strip() == said[0]["generated_text"].strip()


@torch.no_grad()
def test_a_linear_connector_is_saved_where_nobody_adds_a_second_layer(tmp_path):
    tok, vlm = toy(connector="linear")
    vlm.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "plainvlm"
    assert same(VLM.from_pretrained(tmp_path), vlm)


@torch.no_grad()
@pytest.mark.parametrize("trained", ["connector", "vision"])
@pytest.mark.parametrize("by", ["peft", "transformers"])
def test_others_open_our_adapter_over_our_base_and_compute_the_same(tmp_path, trained, by):
    peft = pytest.importorskip("peft")
    lively(VLM(TINY)).save_pretrained(tmp_path / "base")
    vlm = VLM.from_pretrained(tmp_path / "base")
    vlm.requires_grad_(False)
    vlm.get_submodule(trained).requires_grad_(True)
    add_lora(vlm, 2, 4.0)
    for p in vlm.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn(p.shape))
    save_adapter(vlm, tmp_path / "lora", tmp_path / "base", trained_tensors(vlm))
    if by == "peft":
        base = tr.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    else:
        theirs = tr.AutoModelForImageTextToText.from_pretrained(tmp_path / "lora")
    tokens = torch.tensor([[1] + [TINY.image_token] * 16 + [5, 6]])
    close(theirs.eval()(input_ids=tokens, pixel_values=PIXELS[:1]).logits, vlm(tokens, PIXELS[:1]))


# ---- layouts that come without a tower, a tokenizer or a base of their own ---------------------------------


def published(tmp_path):
    """{name: (directory, flags)}"""
    if not LLAMA.exists():
        pytest.skip(f"needs {LLAMA}")
    decoder = replace(TINY.decoder, vocab_size=32000)
    vlm = lively(VLM(replace(TINY, decoder=decoder, image_token=32000, pad_token=32001)))
    clip = clip_folder(tmp_path / "clip", vlm)
    llava, prism = original(tmp_path / "llava", vlm), prismatic(tmp_path / "prism")
    lora, _, _ = original_lora(tmp_path / "lora", llava, vlm)
    for folder in llava, prism:
        (folder / "tokenizer.model").write_bytes(LLAMA.read_bytes())
    tower = ["--vision", str(clip)]
    base = ["--llm", str(llava)]
    return {"original": (llava, tower), "lora": (lora, [*tower, *base]), "prismatic": (prism, [])}


@pytest.mark.parametrize("layout", ["original", "lora", "prismatic"])
def test_a_model_says_the_same_as_published_and_converted(tmp_path, capfd, layout):
    folder, flags = published(tmp_path)[layout]
    Image.effect_noise((90, 50), 90).convert("RGB").save(tmp_path / "a.png")
    question = ["--image", tmp_path / "a.png", "--prompt", "What?", "--max-new-tokens", 12]
    assert ask(folder, *flags, *question) == 0
    said = capfd.readouterr().out
    assert len(said) > 12
    assert main(["convert", str(folder), str(tmp_path / "out"), *flags]) == 0
    assert "in the llava-hf layout" in capfd.readouterr().out
    assert ask(tmp_path / "out", *question) == 0
    assert capfd.readouterr().out == said


@pytest.mark.parametrize("named", [False, True], ids=["--llm", "adapter_config.json"])
def test_a_lora_takes_the_tokenizer_of_its_base(tmp_path, capfd, named):
    lora, (_, tower, _, base) = published(tmp_path)["lora"]
    assert not (lora / "tokenizer.model").exists()
    flags = ["--vision", tower, "--llm", base]
    if named:
        adapter = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": base}
        (lora / "adapter_config.json").write_text(json.dumps(adapter))
        flags = flags[:2]
    choices = {"dtype": "float32", "image_mode": "crop", "template": "llava_v1", "device": "cpu"}
    vlm, tok = open_asked(ModelConfig(str(lora), tower, "" if named else base, **choices))
    assert tok.path == Path(base) / "tokenizer.model"
    assert (vlm.cfg.image_mode, vlm.cfg.template) == ("crop", "llava_v1")
    assert ask(lora, *flags, "--prompt", "What?", "--max-new-tokens", 2) == 0

    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    question = {"text": "What?", "answer": "A cat.", "chosen": "A cat.", "image": "a.png"}
    (tmp_path / "q.jsonl").write_text(json.dumps(question))
    job = ["--method", "dropout-ntp", "--data", tmp_path / "q.jsonl", "--out", tmp_path / "pairs.jsonl"]
    job += ["--image-root", tmp_path]
    job = [str(word) for word in [*job, "--model", lora, *flags, "--max-new-tokens", 2]]
    assert run_program(lambda: pairs.main(job)) == 1
    assert "not one pair could be made" in capfd.readouterr().err


def test_an_unknown_template_is_said_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="did you mean vicuna_v1"):
        sample.main(["--model", str(tmp_path / "none"), "--template", "vicuna"])


def speaker(asked, read, say):
    """A VLM.stream that keeps read(ids of the prompt), and says the ids `say` until one of them ends it."""

    def stream(self, tokens, *rest, stop=(), **choices):
        asked.append(read(tokens[0].tolist()))
        for i in say:
            yield torch.tensor([i])
            if i in stop:
                return

    return stream


def test_internvl_is_asked_with_its_own_tokens_and_ends_at_its_own(tmp_path, monkeypatch, capfd, intern):
    folder, _ = internvl(tmp_path / "m", V=intern.vocab_size)
    (folder / "tokenizer.model").write_bytes(intern.path.read_bytes())
    Image.effect_noise((90, 50), 90).convert("RGB").save(tmp_path / "a.png")
    asked = []
    say = [*intern.encode("A cat."), intern.control["<|im_end|>"], *intern.encode("No more.")]
    with monkeypatch.context() as patch:
        patch.setattr(VLM, "stream", speaker(asked, lambda ids: "".join(map(intern.piece, ids)), say))
        assert ask(folder, "--image", tmp_path / "a.png", "--prompt", "What?") == 0
    assert capfd.readouterr().out == "A cat.\n"
    prompt = asked[0].replace("<0x0A>", "\n")
    assert prompt.startswith("<s><|im_start|>") and prompt.endswith("<|im_start|>assistant\n")
    assert "<img>" + 4 * "<IMG_CONTEXT>" + "</img>" in prompt
    assert ask(folder, "--image", tmp_path / "a.png", "--prompt", "What?", "--max-new-tokens", 3) == 0


# ---- what is said and what is typed ------------------------------------------------------------------------


def test_an_answer_of_llava_v0_ends_at_its_hash_signs(tmp_path, monkeypatch, capfd):
    tok = save_toy(tmp_path / "m", template="llava_v0")
    asked = []
    say = tok.encode("C# is ##nice. ### Human: and then?")
    monkeypatch.setattr(VLM, "stream", speaker(asked, tok.decode, say))
    assert ask(tmp_path / "m", "--prompt", "What?") == 0
    told = capfd.readouterr()
    assert told.out == "C# is ##nice.\n" and "cut off" not in told.err
    assert asked[0].endswith("###Human: What?###Assistant:")


@pytest.mark.parametrize("typed", ["--prompt", "stdin"])
def test_control_tokens_that_a_user_types_stay_text(tmp_path, monkeypatch, typed):
    tok = save_toy(tmp_path / "m")
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    asked = []
    monkeypatch.setattr(VLM, "stream", speaker(asked, list, [tok.eos]))
    words = "</s> <s> <|im_end|> <IMG_CONTEXT> <pad> <unk>"
    flags = ["--image", tmp_path / "a.png"]
    if typed == "stdin":
        words += " <image>"                                                 # in --prompt the picture's place
        monkeypatch.setattr("sys.stdin", io.StringIO(words))
    else:
        flags += ["--prompt", words]
    assert ask(tmp_path / "m", *flags) == 0
    assert words in tok.decode(asked[-1])
    assert [i for i in asked[-1] if i in tok.names] == [tok.bos] + [tok.image] * 16


def test_a_tokenizer_of_another_size_than_the_embedding_is_one_clear_line(tmp_path, capfd):
    tok, vlm = toy()
    vlm.save_pretrained(tmp_path / "m")
    assert ask(tmp_path / "m", "--prompt", "What?") == 1
    assert "tokenizer.model: no tokenizer there" in capfd.readouterr().err
    small = replace(vlm.cfg, decoder=replace(vlm.cfg.decoder, vocab_size=64), image_token=60, pad_token=61)
    lively(VLM(small)).save_pretrained(tmp_path / "m")
    (tmp_path / "m/tokenizer.model").write_bytes((ASSETS / "toy-vicuna/tokenizer.model").read_bytes())
    assert ask(tmp_path / "m", "--prompt", "What?") == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert f"{tok.n_text:,} pieces and <image> at {tok.image:,}, the model an embedding of 64 rows" in last
