"""The public weights as a user meets them: true sizes without their numbers, directories that transformers wrote, answers, and damage."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import eval
import model
import mpo
import pairs
import sample
from conversation import Tokenizer
from support.cli import parse, run
from model import Decoder, DecoderConfig, PRESETS, VLM, VLMConfig
from support.export import clip_json, clip_name, llama_json, llava_config, llava_name, save_processor
from support.weights import decoder_config, our_names, tower_tensors, vision_config
from test_data import intern  # noqa: F401 (a fixture)
from test_layouts import LLAMA, LM2, TINY, close, internlm2, intern_names, lively, narrow, original, parts, projector, same, size, timm_names, write
from sample import open_model
from vision import ViT, VisionConfig
import tools.weights as tools_weights

transformers = tr = pytest.importorskip("transformers")
ASSETS = Path(__file__).parents[1] / "assets"


def errors(capfd):
    return [line for line in capfd.readouterr().err.strip().splitlines() if not line.startswith("loaded")]


# ---- true sizes -----------------------------------------------------------------------------------------------------

LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
CLIP_L = LARGE | dict(intermediate_size=4096, patch_size=14, projection_dim=768)
SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14)
TOWERS = {                          # what they are called, their config as published, what their files hold beyond the tower, the published number
    "CLIP ViT-L/14-336": (tr.CLIPVisionModel, tr.CLIPVisionConfig(**CLIP_L, image_size=336), "", 303_507_456),
    "CLIP ViT-L/14": (tr.CLIPVisionModel, tr.CLIPVisionConfig(**CLIP_L, image_size=224), "", 303_179_776),
    "CLIP ViT-B/16": (tr.CLIPVisionModel, tr.CLIPVisionConfig(patch_size=16), "", 85_799_424),
    "SigLIP SO400M-384": (tr.SiglipVisionModel, tr.SiglipVisionConfig(**SO400M, image_size=384), "head.", 428.2),
    "SigLIP base": (tr.SiglipVisionModel, tr.SiglipVisionConfig(), "head.", 92.9),
    "DINOv2-L": (tr.Dinov2Model, tr.Dinov2Config(**LARGE, image_size=518), "mask_token", 304.4),
    "DINOv2-L with registers": (tr.Dinov2WithRegistersModel, tr.Dinov2WithRegistersConfig(**LARGE, image_size=224, patch_size=14), "mask_token", 303.2),
    "ImageNet ViT-L/16": (tr.ViTModel, tr.ViTConfig(**LARGE, intermediate_size=4096), "pooler", 303.3),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_of_true_size_has_the_published_number_of_parameters(name):
    Theirs, config, extra, published = TOWERS[name]
    with torch.device("meta"):
        theirs, ours = Theirs(config), ViT(vision_config(config.to_dict()))
    beyond = sum(p.numel() for n, p in theirs.named_parameters() if extra and extra in n)
    assert size(ours) + beyond == size(theirs)
    counted = size(theirs) if extra == "head." else size(ours)              # SigLIP is published with its pooling head, the others without theirs
    assert published == (counted if isinstance(published, int) else round(counted / 1e6, 1))


@pytest.mark.parametrize("Config", [tr.CLIPVisionConfig, tr.SiglipVisionConfig, tr.Dinov2Config, tr.Dinov2WithRegistersConfig, tr.ViTConfig])
def test_what_a_towers_config_leaves_out_means_the_defaults_of_its_class(Config):
    assert vision_config({"model_type": Config.model_type}) == vision_config(Config().to_dict())


@pytest.mark.parametrize("Config", [tr.LlamaConfig, tr.MistralConfig])
def test_what_a_decoders_config_leaves_out_means_the_defaults_of_its_class(Config):
    assert decoder_config({"model_type": Config.model_type}) == decoder_config(Config().to_dict())


SIZES = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)


@pytest.mark.parametrize("Config, fields, published", [
    (tr.LlamaConfig, {}, 6_738_415_616), (tr.LlamaConfig, SIZES, 13_015_864_320),
    (tr.LlamaConfig, dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4), 1_100_048_384),     # TinyLlama
    (tr.MistralConfig, {}, 7_241_732_096)])
def test_a_decoder_of_true_size_has_the_published_number_of_parameters(Config, fields, published):
    with torch.device("meta"):
        assert size(Decoder(decoder_config(Config(**fields).to_dict()))) == published


@pytest.mark.parametrize("name, dims", [("llava-1.5-7b", {}), ("llava-1.5-13b", SIZES)])
def test_every_tensor_of_llava_at_its_true_size_finds_its_place(name, dims):
    text, vision = tr.LlamaConfig(vocab_size=32064, **dims), tr.CLIPVisionConfig(**CLIP_L, image_size=336)
    with torch.device("meta"):
        theirs = tr.LlavaForConditionalGeneration(tr.LlavaConfig(vision_config=vision, text_config=text)).state_dict()
        ours = VLM(PRESETS[name]).state_dict()
    found = our_names({n: Stored(None, n, t) for n, t in theirs.items()}, PRESETS[name])
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in ours.items()}
    assert len(found) == {"llava-1.5-7b": 686, "llava-1.5-13b": 758}[name] and found.keys() == our_names(
        {llava_name(n): Stored(None, n, t) for n, t in ours.items()}, PRESETS[name]).keys()


@pytest.mark.parametrize("kind, n_in, D, total", [
    ("fused_gelu", 2176, 4096, 71_385_600), ("fused_gelu", 2176, 5120, 89_737_728), ("fused_gelu", 2048, 4096, 67_125_248),     # DINOv2 + SigLIP, + CLIP
    ("mlp2x_gelu", 1024, 4096, 20_979_712), ("mlp2x_gelu", 1024, 5120, 31_467_520), ("mlp2x_gelu", 1152, 4096, 21_504_000)])
def test_a_connector_of_true_size_has_the_published_number_of_parameters(kind, n_in, D, total):
    tower = VisionConfig(n_embd=min(n_in, 1024), n_layer=1, n_hidden=8) if n_in != 1152 else VisionConfig(n_embd=1152, n_layer=1, n_hidden=8)
    second = replace(tower, n_embd=n_in - 1024, n_head=16) if n_in > 1152 else None
    with torch.device("meta"):
        assert size(model.Connector(VLMConfig(tower, DecoderConfig(n_embd=D), kind, vision2=second))) == total
    a, b = n_in * 4, D
    assert total == ((n_in * a + a + a * b + b + b * b + b) if kind == "fused_gelu" else (n_in * D + D + D * D + D))


# ---- what transformers wrote, answered here as there -----------------------------------------------------------------

SAYS = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
PROCESSORS = {"crop": "CLIPImageProcessor", "pad": "LlavaImageProcessor"}


def toy(**changes):
    """A tiny LLaVA with the toy's tokenizer."""
    tok = Tokenizer(ASSETS / "toy-vicuna")
    cfg = VLMConfig(VisionConfig(56, 14, 32, 3, 2, 64), DecoderConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=16,
                                                                       n_hidden=48, block_size=512), image_token=tok.image, pad_token=tok.pad)
    return tok, lively(VLM(replace(cfg, **changes)))


def as_transformers_writes(folder, mode, old=True):
    """A LLaVA directory in the words of transformers alone, with the image processor's config in its own file as on the hub, or where version 5 puts it."""
    tok, vlm = toy()
    save_processor(folder, tok.path, vlm.cfg)
    config = {k: v for k, v in llava_config(vlm.cfg, "float32").items() if k not in ("image_aspect_ratio", "mm_projector_type", "template")}
    theirs = tr.LlavaForConditionalGeneration(tr.LlavaConfig(**config)).eval()
    theirs.load_state_dict({llava_name(n).replace("language_model.lm_head", "lm_head").replace("language_model.model", "model.language_model").replace(
        "vision_tower.vision_model", "model.vision_tower").replace("multi_modal", "model.multi_modal"): t for n, t in vlm.state_dict().items()}, strict=True)
    pictures = getattr(tr, PROCESSORS[mode])(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, **{"do_pad": True} if mode == "pad" else {})
    processor = tr.LlavaProcessor(pictures, tr.AutoTokenizer.from_pretrained(folder), patch_size=14, vision_feature_select_strategy="default",
                                  num_additional_image_tokens=1)
    for file in [*folder.glob("*.json")]:
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
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    inputs = processor(images=picture, text=f"{SAYS} USER: <image>\nWhat color is it? ASSISTANT:", return_tensors="pt")
    banned = list(range(theirs.config.image_token_index, theirs.config.text_config.vocab_size))
    ids = theirs.generate(**inputs, max_new_tokens=24, do_sample=False, suppress_tokens=banned)[0, inputs["input_ids"].shape[1] :]
    said, stream = [], VLM.stream
    monkeypatch.setattr(VLM, "stream", lambda *a, **b: (said.append(int(new)) or new for new in stream(*a, **b)))
    ask = lambda *flags: run(lambda: sample.main(["--model", str(tmp_path / "m"), "--image", str(tmp_path / "a.png"), "--prompt", "What color is it?",
                                                  "--max-new-tokens", "24", *flags]))
    assert ask() == 0 and said == ids.tolist() and len(said) == 24
    assert capfd.readouterr().out == Tokenizer(tmp_path / "m").decode(said).strip() + "\n"
    if size[0] != size[1]:                                                  # and --image-mode is heard
        assert ask("--image-mode", "pad" if mode == "crop" else "crop") == 0 and said[24:] != said[:24]


def published(tmp_path):
    """{name: (directory, flags)} of tiny models in the layouts that come without a tower, a tokenizer or a base of their own."""
    if not LLAMA.exists():
        pytest.skip(f"needs {LLAMA}")
    vlm = lively(VLM(replace(TINY, decoder=replace(TINY.decoder, vocab_size=32000), image_token=32000, pad_token=32001)))
    clip = write(tmp_path / "clip", clip_json(vlm.cfg.vision), {clip_name(n): t for n, t in parts(vlm, "vision").items()})
    llava, prism = original(tmp_path / "llava", vlm), prismatic(tmp_path / "prism")
    lora = write(tmp_path / "lora", json.loads((llava / "config.json").read_text()), {
        f"base_model.model.model.layers.0.self_attn.o_proj.lora_{x}.weight": t for x, t in (("A", torch.randn(2, 32)), ("B", torch.randn(32, 2)))}, "adapter_model.bin")
    (lora / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "base_model_name_or_path": "x"}))
    write(lora, None, projector(vlm, "base_model.model.model.mm_projector."), "non_lora_trainables.bin")
    for folder in llava, prism:
        (folder / "tokenizer.model").write_bytes(LLAMA.read_bytes())
    tower = ["--vision", str(clip)]
    return {"original": (llava, tower), "lora": (lora, [*tower, "--llm", str(llava)]), "prismatic": (prism, [])}


@pytest.mark.parametrize("layout", ["original", "lora", "prismatic"])
def test_a_model_says_the_same_as_published_and_converted(tmp_path, capfd, layout):
    folder, flags = published(tmp_path)[layout]
    Image.effect_noise((90, 50), 90).convert("RGB").save(tmp_path / "a.png")
    ask = lambda *where: run(lambda: sample.main([*where, "--image", str(tmp_path / "a.png"), "--prompt", "What?", "--max-new-tokens", "12"]))
    assert ask("--model", str(folder), *flags) == 0
    said = capfd.readouterr().out
    assert run(lambda: tools_weights.main(["convert", str(folder), str(tmp_path / "out"), *flags])) == 0 and "in the llava-hf layout" in capfd.readouterr().out
    assert ask("--model", str(tmp_path / "out")) == 0 and capfd.readouterr().out == said and len(said) > 12


def test_sample_eval_and_pairs_open_a_lora_whose_tokenizer_lies_with_its_base(tmp_path, capfd):
    lora, flags = published(tmp_path)["lora"]
    base = Path(flags[-1])
    assert not (lora / "tokenizer.model").exists()
    for named in False, True:                                               # the base by --llm, or where adapter_config.json says
        if named:
            (lora / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}))
            flags = flags[:2]
        vlm, tok = open_model(lora, vision=flags[1], llm=None if named else str(base), dtype="float32", image_mode="crop", template="llava_v1")
        assert tok.path == base / "tokenizer.model" and (vlm.cfg.image_mode, vlm.cfg.template) == ("crop", "llava_v1")
        assert run(lambda: sample.main(["--model", str(lora), *flags, "--prompt", "What?", "--max-new-tokens", "2"])) == 0
        cfg = parse(eval.EvalConfig, ["--model", str(lora), *flags, "--device", "cpu"])
        asked, its_tok = eval.open_asked(cfg)
        assert its_tok.path == tok.path and asked.decoder.lm_head.weight.dtype == torch.float32
        (tmp_path / "q.jsonl").write_text('{"text": "What?", "answer": "A cat.", "chosen": "A cat."}\n')
        flags = ["--method", "dropout-ntp", "--data", tmp_path / "q.jsonl", "--out", tmp_path / f"pairs{named}", "--model", lora, *flags, "--max-new-tokens", 2]
        assert run(lambda: pairs.main([str(word) for word in flags])) == 1 and "not one pair could be made" in capfd.readouterr().err
    with pytest.raises(ValueError, match="did you mean 'vicuna_v1'"):
        open_model(tmp_path / "none", template="vicuna")                    # before anything is read


def test_internvl_is_asked_with_its_own_tokens_and_ends_at_its_own(tmp_path, monkeypatch, capfd, intern):
    folder = internvl(tmp_path / "m", intern.vocab_size)
    (folder / "tokenizer.model").write_bytes(intern.path.read_bytes())
    Image.effect_noise((90, 50), 90).convert("RGB").save(tmp_path / "a.png")
    asked = []

    def stream(self, tokens, *rest, stop, **flags):
        asked.append("".join(intern.piece(i) for i in tokens[0].tolist()))
        for i in [*intern.encode("A cat."), intern.control["<|im_end|>"]]:
            yield torch.tensor([i])
            if i in stop:
                return
        raise AssertionError("not stopped")
    with monkeypatch.context() as patch:
        patch.setattr(VLM, "stream", stream)
        assert run(lambda: sample.main(["--model", str(folder), "--image", str(tmp_path / "a.png"), "--prompt", "What?"])) == 0
    assert capfd.readouterr().out == "A cat.\n"
    assert asked[0].startswith("<s><|im_start|>") and "<img>" + 4 * "<IMG_CONTEXT>" + "</img>" in asked[0] and asked[0].replace("<0x0A>", "\n").endswith("<|im_start|>assistant\n")
    assert run(lambda: sample.main(["--model", str(folder), "--image", str(tmp_path / "a.png"), "--max-new-tokens", "3"])) == 0


# ---- answers that end with a string ---------------------------------------------------------------------------------

def test_an_answer_of_llava_v0_ends_at_its_hash_signs(tmp_path, monkeypatch, capfd):
    tok, vlm = toy(template="llava_v0")
    save_processor(tmp_path / "m", tok.path, vlm.cfg)
    vlm.save_pretrained(tmp_path / "m")
    asked = []

    def stream(self, tokens, *rest, **flags):
        asked.append(tok.decode(tokens[0].tolist()))
        for i in tok.encode("C# is ##nice. ### Human: and then?"):
            yield torch.tensor([i])
    monkeypatch.setattr(VLM, "stream", stream)
    assert run(lambda: sample.main(["--model", str(tmp_path / "m"), "--prompt", "What?"])) == 0
    told = capfd.readouterr()
    assert told.out == "C# is ##nice.\n" and "cut off" not in told.err
    assert asked[0].endswith("###Human: What?###Assistant:")


# ---- what a user types ----------------------------------------------------------------------------------------------

def test_control_tokens_on_the_command_line_stay_text(tmp_path, monkeypatch):
    tok, vlm = toy()
    save_processor(tmp_path / "m", tok.path, vlm.cfg)
    vlm.save_pretrained(tmp_path / "m")
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    asked = []
    monkeypatch.setattr(VLM, "stream", lambda self, tokens, *rest, **flags: asked.append(tokens[0].tolist()) or iter([torch.tensor([tok.eos])]))
    typed = "</s> <s> <|im_end|> <IMG_CONTEXT> <image> <pad> <unk>"
    assert run(lambda: sample.main(["--model", str(tmp_path / "m"), "--image", str(tmp_path / "a.png"), "--prompt", typed])) == 0
    assert typed in tok.decode(asked[0]) and [i for i in asked[0] if i in tok.names] == [tok.bos] + [tok.image] * 16


# ---- convert, info, number formats ----------------------------------------------------------------------------------

def towerless(tmp_path):
    vlm = narrow()
    clip = write(tmp_path / "clip", clip_json(vlm.cfg.vision), {clip_name(n): t for n, t in parts(vlm, "vision").items()})
    return vlm, original(tmp_path / "m", vlm), clip


def test_info_reads_no_weights_and_wants_the_tower_of_a_model_published_without(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Stored, "of", None)
    vlm, folder, clip = towerless(tmp_path)
    assert run(lambda: tools_weights.main(["info", str(folder)])) == 1
    assert "holds no vision tower (its config names openai/clip); give the directory of that tower by --vision DIR" in capsys.readouterr().err
    assert run(lambda: tools_weights.main(["info", str(folder), "--vision", str(clip)])) == 0
    assert f"{size(vlm):,} parameters" in capsys.readouterr().out


def test_info_says_why_a_directory_of_llava_hf_crops_and_what_pads(tmp_path, capsys):
    as_transformers_writes(tmp_path / "crop", "crop")
    as_transformers_writes(tmp_path / "pad", "pad")
    for name, crops in ("crop", True), ("pad", False):
        assert run(lambda: tools_weights.main(["info", str(tmp_path / name)])) == 0
        said = capsys.readouterr().out
        assert f"px, mode {name}" in said and ("LLaVA-1.5 itself was trained with pad: --image-mode pad" in said) == crops


@torch.no_grad()
def test_convert_merges_a_lora_and_transformers_opens_it(tmp_path):
    vlm, base, clip = towerless(tmp_path)
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    lora = write(tmp_path / "lora", json.loads((base / "config.json").read_text()), {
        f"base_model.model.model.layers.0.self_attn.o_proj.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}, "adapter_model.bin")
    (lora / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "base_model_name_or_path": "x"}))
    write(lora, None, projector(vlm, "base_model.model.model.mm_projector."), "non_lora_trainables.bin")
    flags = ["--vision", str(clip), "--llm", str(base)]
    assert run(lambda: tools_weights.main(["info", str(lora), *flags])) == run(lambda: tools_weights.main(["convert", str(lora), str(tmp_path / "hf"), *flags])) == 0
    theirs = tr.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    close(theirs.model.language_model.layers[0].self_attn.o_proj.weight, vlm.decoder.layers[0].self_attn.o_proj.weight + 4 / 2 * b @ a)


def test_convert_of_a_sharded_vicuna_keeps_every_number_and_its_format(tmp_path):
    llama = tr.LlamaForCausalLM(tr.LlamaConfig(**llama_json(TINY.decoder))).half()
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(llama.state_dict())}
    for file in set(files.values()):
        write(tmp_path / "m", llama_json(TINY.decoder), {n: t for n, t in llama.state_dict().items() if files[n] == file}, file)
    (tmp_path / "m/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert run(lambda: tools_weights.main(["convert", str(tmp_path / "m"), str(tmp_path / "out")])) == 0
    again = load_file(tmp_path / "out/model.safetensors")
    assert again.keys() == files.keys() and all(torch.equal(t, again[n]) and again[n].dtype == torch.float16 for n, t in llama.state_dict().items())


def test_a_file_from_before_torch_wrote_zips_opens_too(tmp_path):
    vlm, folder, clip = towerless(tmp_path)
    file = folder / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    assert same(VLM.from_pretrained(folder, vision=str(clip)), vlm)


@pytest.mark.parametrize("stored, opened", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)])
def test_without_a_wish_the_weights_stay_as_they_are_stored_but_a_cpu_computes_float16_in_bfloat16(tmp_path, stored, opened):
    lively(VLM(TINY)).to(stored).save_pretrained(tmp_path)
    assert {p.dtype for p in VLM.from_pretrained(tmp_path, dtype=None).parameters()} == {opened}
    assert {p.dtype for p in VLM.from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_opening_a_model_holds_it_once_and_does_not_import_the_compiler(tmp_path):
    """float16 .bin to bfloat16 in a process of its own: beside the weights only so much of the files is mapped. The tables of words are larger than that."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    tok, vlm = toy(decoder=DecoderConfig(vocab_size=32064, n_layer=1, n_head=8, n_kv_head=1, n_embd=768, head_dim=32, n_hidden=64))
    save_processor(tmp_path, tok.path, vlm.cfg)
    torch.save({llava_name(n): t.half() for n, t in vlm.state_dict().items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(llava_config(vlm.cfg, "float16")))
    del vlm
    code = """if True:
        import re, sys, torch, model
        peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        support_weights.MAPPED = 2**22
        before, vlm = peak(), model.VLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
        print(peak() - before, sum(2 * p.numel() for p in vlm.parameters()), "torch._dynamo" in sys.modules)"""
    grown, size, compiler = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ASSETS.parent, capture_output=True, text=True, check=True).stdout.split()
    assert int(grown) < int(size) + 25e6 and compiler == "False"


# ---- damage ---------------------------------------------------------------------------------------------------------

def prismatic(folder):
    """Prismatic's own layout, a LLaVA-like model of one CLIP tower inside the checkpoint."""
    vlm = lively(VLM(replace(TINY, decoder=DecoderConfig(32064, 1, 1, 1, 128, 128, 32), image_token=32001, pad_token=32000)))
    state = {"projector": {k: t for k, t in projector(vlm, "projector.").items()}, "vision_backbone": {"featurizer." + k: t for k, t in timm_names(vlm.vision).items()},
             "llm_backbone": {("llm." if n.startswith("lm_head") else "llm.model.") + n: t for n, t in parts(vlm, "decoder").items()}}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"model": state}, folder / "checkpoints/latest-checkpoint.pt")
    (folder / "config.json").write_text(json.dumps({"model": {"model_id": "p", "vision_backbone_id": "clip-vit-l-56px", "llm_backbone_id": "llama2-7b-pure",
                                                              "arch_specifier": "no-align+gelu-mlp", "image_resize_strategy": "letterbox"}}))
    return folder


def internvl(folder, V=96):
    tower = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=[56, 56], patch_size=[14, 14], attention_bias=True,
                 norm_type="layer_norm", use_qk_norm=False)
    theirs = lively(tr.InternVLForConditionalGeneration(tr.InternVLConfig(vision_config=tower, text_config=llama_json(replace(TINY.decoder, block_size=2048, vocab_size=V)),
                                                                          image_token_id=V - 7, image_seq_length=4, tie_word_embeddings=False)))
    return write(folder, {"model_type": "internvl_chat", "downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1, "template": "internvl2_5",
                          "llm_config": LM2 | {"vocab_size": V}, "vision_config": {"model_type": "intern_vit_6b", **tower, "image_size": 56, "patch_size": 14, "hidden_act": "gelu",
                                                               "qkv_bias": True, "qk_normalization": False}}, intern_names(theirs.state_dict(), TINY.decoder))


def llava_original(folder):
    return original(folder, narrow(), tower=True)


def without(*path):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        inner = config
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]
        (folder / "config.json").write_text(json.dumps(config))
    return spoil


def eight_bits(word):
    """Store the first tensor with this word in its name as int8, wherever in the file it is."""
    def spoil(folder):
        file = next(f for f in (*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("checkpoints/*.pt")))
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        place = tensors["model"]["llm_backbone"] if "model" in tensors else tensors
        name = next(n for n in place if word in n)
        place[name] = place[name].to(torch.int8)
        save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)
    return spoil


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def lost_shard(folder):
    index = {"weight_map": {"model.norm.weight": "pytorch_model-00001-of-00002.bin", "lm_head.weight": "pytorch_model-00002-of-00002.bin"}}
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def without_words(folder):
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del tensors["model.embed_tokens.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")


def unknown(folder):
    config = json.loads((folder / "config.json").read_text())
    config["llm_config" if "llm_config" in config else "model"] |= {"model_type": "qwen2", "llm_backbone_id": "phi-2-3b"}
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES = {
    **{f"prismatic without {name}": (prismatic, without("model", name), f"config.json: {name} is missing; it must be a text")
       for name in ("vision_backbone_id", "arch_specifier", "llm_backbone_id", "image_resize_strategy")},
    "prismatic with phi-2": (prismatic, unknown, "config.json: llm_backbone_id is 'phi-2-3b'; only vicuna, llama2 and mistral"),
    "prismatic in 8 bits": (prismatic, eight_bits("o_proj"), "o_proj.weight is int8; quantised weights cannot be read"),
    "prismatic cut off": (prismatic, cut("checkpoints/latest-checkpoint.pt"), "latest-checkpoint.pt: truncated or damaged"),
    "internvl without llm_config": (internvl, without("llm_config"), "config.json: llm_config is missing; it must be an object"),
    "internvl without vision_config": (internvl, without("vision_config"), "config.json: vision_config is missing; it must be an object"),
    "internvl without its width": (internvl, without("llm_config", "hidden_size"), "do not fit this architecture: .*such as .*Check config.json against the weights"),
    "internvl with qwen": (internvl, unknown, "config.json: model_type is 'qwen2'; only 'llama', 'mistral' and 'internlm2'"),
    "internvl in 8 bits": (internvl, eight_bits("attention.wo"), "attention.wo.weight is int8; quantised weights cannot be read"),
    "internvl cut off": (internvl, cut("model.safetensors"), "model.safetensors: truncated or damaged"),
    "original in 8 bits": (llava_original, eight_bits("gate_proj"), "gate_proj.weight is int8; quantised weights cannot be read"),
    "original without a shard": (llava_original, lost_shard, "pytorch_model-00002-of-00002.bin: not found; .* is no complete model directory"),
    "original without its words": (llava_original, without_words, "do not fit this architecture: 1 missing, such as language_model.model.embed_tokens.weight"),
    "original with a broken processor": (llava_original, lambda folder: (folder / "processor_config.json").write_text('{"image_processor": 5}'),
                                         "processor_config.json: image_processor is 5; it must be an object"),
    "original with another broken processor": (llava_original, lambda folder: (folder / "preprocessor_config.json").write_text("[]"),
                                               "preprocessor_config.json: holds a list"),
    "original without its connector's kind": (llava_original, without("mm_projector_type"), "do not fit this architecture: .*such as .*Check config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_line_and_exit_code_1(tmp_path, capfd, damage):
    make, spoil, says = DAMAGES[damage]
    folder = make(tmp_path / "m")
    VLM.from_pretrained(folder)
    spoil(folder)
    capfd.readouterr()
    assert run(lambda: sample.main(["--model", str(folder), "--prompt", "What?"])) == 1
    line, = errors(capfd)
    assert re.search(f"^error: {folder}.*{says}", line) and line.count(".json: ") <= 1, line


def test_a_tokenizer_of_another_size_than_the_embedding_is_one_clear_line(tmp_path, capfd):
    tok, vlm = toy()
    vlm.save_pretrained(tmp_path / "m")
    ask = lambda: run(lambda: sample.main(["--model", str(tmp_path / "m"), "--prompt", "What?"]))
    assert ask() == 1 and "tokenizer.model: no tokenizer there" in (lines := errors(capfd))[0] and len(lines) == 1
    small = replace(vlm.cfg, decoder=replace(vlm.cfg.decoder, vocab_size=64), image_token=60, pad_token=61)
    lively(VLM(small)).save_pretrained(tmp_path / "m")
    (tmp_path / "m/tokenizer.model").write_bytes((ASSETS / "toy-vicuna/tokenizer.model").read_bytes())
    assert ask() == 1
    line, = errors(capfd)
    assert f"{tok.n_text:,} pieces and <image> at {tok.image:,}, the model an embedding of 64 rows and <image> at 60" in line
