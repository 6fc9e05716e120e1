"""Every public layout opens as in its reference library, is converted, and refused when damaged."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from layouts import (
    DINO,
    LLAMA,
    LM2,
    PIXELS,
    PRISM,
    SIZE,
    TINY,
    TOWERS,
    clip_folder,
    close,
    count,
    features_of,
    internlm2,
    internvl,
    lively,
    narrow,
    original,
    original_lora,
    prismatic,
    projector,
    same,
    timm_names,
    tr,
    write,
    write_prismatic,
    write_shards,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import support.start as start
import train
from conversation import Tokenizer
from model import VLM, Connector, Decoder, DecoderConfig
from support.cli import UserError, run_program
from support.configs import IMAGENET_MEAN, IMAGENET_STD, decoder_config, read_config
from support.export import TO_LLAVA, clip_json, llama_json, llava_config
from support.io import read_json
from support.processor import save_processor
from support.weights import (
    check_tokenizer,
    fit_tower,
    load_connector,
    load_decoder,
    load_vision,
    read_tower,
    rename,
)
from tools.weights import main
from vision import VisionConfig, ViT

ROOT = Path(__file__).parents[1]


def convert(src, out, *flags):
    return run_program(lambda: main(["convert", str(src), str(out), *map(str, flags)]))


def info(name, *flags):
    return run_program(lambda: main(["info", str(name), *map(str, flags)]))


# ---- towers ------------------------------------------------------------------------------------------------


def open_tower(path, **changes):
    vit = ViT(replace(read_tower(path), **changes))
    load_vision(vit, path)
    return vit.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_that_transformers_wrote_sees_the_same(tmp_path, capsys, kind):
    theirs = lively(TOWERS[kind]())
    theirs.save_pretrained(tmp_path)
    close(open_tower(tmp_path)(PIXELS), features_of(theirs))
    assert f"tensors from {tmp_path}, 0 missing, 0 unused" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip vision", "siglip vision", "registers", "dinov2", "vit"])
def test_timms_names_are_the_same_towers(tmp_path, kind):
    theirs = lively(TOWERS[kind]())
    theirs.save_pretrained(tmp_path / "hf")
    ours = open_tower(tmp_path / "hf")
    tensors = timm_names(ours, folded=kind == "registers") | {"head.weight": torch.zeros(3, 64)}
    folder = write(tmp_path / "timm", {"architecture": "vit"}, tensors)

    # timm's file says neither which GELU nor which epsilon: the usual ones of the family are taken.
    unsaid = {"activation": ours.cfg.activation, "norm_eps": ours.cfg.norm_eps}
    assert replace(read_tower(folder), **unsaid) == ours.cfg
    close(open_tower(folder, **unsaid)(PIXELS), features_of(theirs))


def test_one_register_is_a_row_like_several(tmp_path):
    theirs = tr.Dinov2WithRegistersModel(tr.Dinov2WithRegistersConfig(**DINO, num_register_tokens=1))
    theirs.save_pretrained(tmp_path)
    assert open_tower(tmp_path).registers.shape == (1, 64)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["registers", "dinov2"])
@pytest.mark.parametrize("S", [42, 98])
def test_a_position_table_is_resized_as_dinov2_does_at_run_time(tmp_path, kind, S):
    theirs = lively(TOWERS[kind]())
    theirs.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, S, S)
    close(open_tower(tmp_path, image_size=S)(pixels), features_of(theirs, pixels))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["registers", "dinov2"])
def test_a_position_table_in_timms_names_is_resized_as_timm_does(tmp_path, kind):
    lively(TOWERS[kind]()).save_pretrained(tmp_path / "hf")
    usual = open_tower(tmp_path / "hf")
    folder = write(tmp_path / "timm", {"architecture": "vit"}, timm_names(usual))
    table = usual.pos[1:].T.reshape(1, 64, 4, 4)
    smooth = F.interpolate(table, size=(3, 3), mode="bicubic", antialias=True)
    assert_close(open_tower(folder, image_size=42).pos[1:], smooth[0].flatten(1).T)


def test_a_resized_table_keeps_the_class_row_and_a_constant():
    cfg = VisionConfig(image_size=98, patch_size=14, n_embd=4, n_head=1)
    pos = torch.cat([torch.arange(4.0)[None], torch.full((16, 4), 0.3)])
    tensors = {"pos": pos}
    fit_tower(tensors, cfg)
    assert_close(tensors["pos"], torch.cat([pos[:1], torch.full((49, 4), 0.3)]))


# ---- language models ---------------------------------------------------------------------------------------

DIMS = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
DIMS |= dict(num_attention_heads=4, num_key_value_heads=2)
DECODERS = {
    "llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**DIMS, rms_norm_eps=1e-5)),
    "tied": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**DIMS, tie_word_embeddings=True)),
    "mistral": lambda: tr.MistralForCausalLM(tr.MistralConfig(**DIMS, head_dim=8, sliding_window=16)),
}


def same_logits(folder, theirs):
    cfg = decoder_config(read_json(folder / "config.json"))
    decoder = Decoder(cfg)
    load_decoder(decoder, folder)
    tokens = torch.randint(96, (2, 14))
    close(decoder.lm_head(decoder(decoder.embed_tokens(tokens))), theirs(tokens).logits)
    return cfg


@torch.no_grad()
@pytest.mark.parametrize("kind", DECODERS)
def test_a_language_model_alone_gives_the_same_logits(tmp_path, kind):
    theirs = lively(DECODERS[kind]())
    theirs.save_pretrained(tmp_path)
    cfg = same_logits(tmp_path, theirs)
    assert cfg.block_size == (16 if kind == "mistral" else 2048)            # one window


@torch.no_grad()
def test_shards_in_bin_files_are_read_without_the_frequencies_beside_them(tmp_path):
    theirs = lively(DECODERS["llama"]())
    theirs.save_pretrained(tmp_path)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    write_shards(tmp_path, load_file(tmp_path / "model.safetensors") | frequencies)
    (tmp_path / "model.safetensors").unlink()
    same_logits(tmp_path, theirs)


@torch.no_grad()
def test_internlm2_is_a_llama_whose_queries_keys_and_values_lie_by_head(tmp_path):
    config = tr.LlamaConfig(**llama_json(replace(TINY.decoder, block_size=2048)))
    theirs = lively(tr.LlamaForCausalLM(config))
    write(tmp_path, LM2, internlm2(theirs.state_dict(), TINY.decoder), "pytorch_model.bin")
    same_logits(tmp_path, theirs)


@torch.no_grad()
def test_words_that_a_decoder_adds_begin_as_the_mean_of_the_others(tmp_path):
    theirs = lively(DECODERS["llama"]())
    theirs.save_pretrained(tmp_path)
    decoder = Decoder(replace(decoder_config(read_json(tmp_path / "config.json")), vocab_size=100))
    load_decoder(decoder, tmp_path)
    for mine, words in (decoder.embed_tokens, theirs.model.embed_tokens), (decoder.lm_head, theirs.lm_head):
        assert torch.equal(mine.weight[:96], words.weight)
        assert_close(mine.weight[96:], words.weight.mean(0).expand(4, -1))


# ---- LLaVA -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("connector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("tower", [False, True])
def test_the_original_layout_opens_with_its_tower_or_with_one_given(tmp_path, connector, tower):
    vlm = narrow(connector)
    clip = clip_folder(tmp_path / "clip", vlm)
    folder = original(tmp_path / "m", vlm, tower)
    if not tower:
        with pytest.raises(UserError, match="holds no vision tower .*openai/clip.*--vision DIR"):
            VLM.from_pretrained(folder)
    again = VLM.from_pretrained(folder, vision=None if tower else str(clip))
    assert same(again, vlm)
    assert again.cfg.template == ("llava_v1" if connector == "linear" else "vicuna_v1")

    # <image> and <pad> lie beyond the table of words, and are never said.
    tokens = torch.tensor([[1] + [32000] * 16 + [5, 6], [1, 3] + [32001] * 17])
    pixels = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)
    assert again(tokens, pixels).shape == (2, 19, 320)
    assert again.generate(tokens[:1], pixels, max_new_tokens=3).max() < 320


def test_a_model_with_a_tower_takes_no_other(tmp_path):
    vlm = narrow()
    with pytest.raises(UserError, match="has its own vision tower"):
        folder = original(tmp_path / "m", vlm, tower=True)
        VLM.from_pretrained(folder, vision=str(clip_folder(tmp_path / "clip", vlm)))


@pytest.mark.parametrize("connector", ["mlp2x_gelu", "linear"])
def test_the_connector_that_stage_1_of_the_original_code_wrote_is_read_alone(tmp_path, connector):
    vlm = narrow(connector)
    write(tmp_path, None, projector(vlm), "mm_projector.bin")
    fresh = Connector(vlm.cfg)
    load_connector(fresh, tmp_path / "mm_projector.bin")
    assert same(fresh, vlm.connector)


@torch.no_grad()
@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_lora_is_merged_over_its_base(tmp_path, file):
    base, tuned = narrow(), narrow()
    clip = str(clip_folder(tmp_path / "clip", base))
    under = str(original(tmp_path / "base", base))
    nn.init.normal_(tuned.connector.layers[2].bias)
    lora, A, B = original_lora(tmp_path / "lora", tmp_path / "base", tuned, file, 1, "q_proj")
    tuned.decoder.layers[1].self_attn.q_proj.weight += 4 / 2 * B @ A

    with pytest.raises(UserError, match="LoRA over 'lmsys/vicuna'.*--llm DIR"):
        VLM.from_pretrained(lora, vision=clip)
    assert same(VLM.from_pretrained(lora, vision=clip, llm=under), tuned)
    (lora / "adapter_config.json").write_text('{"r": 8, "rank_pattern": {"q_proj": 2}, "lora_alpha": 4}')
    assert same(VLM.from_pretrained(lora, vision=clip, llm=under), tuned)
    write(lora, None, {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": A}, file)
    with pytest.raises(UserError, match="its LoRA of decoder.layers.7.self_attn.q_proj.weight does not fit"):
        VLM.from_pretrained(lora, vision=clip, llm=under)
    write(lora, None, {"base_model.model.model.embed_tokens.lora_embedding_A": A}, file)
    with pytest.raises(UserError, match="its LoRA of decoder.embed_tokens.lora_embedding_A.* does not fit"):
        VLM.from_pretrained(lora, vision=clip, llm=under)
    (lora / file).unlink()
    write(lora, None, projector(base), "mm_projector.bin")
    with pytest.raises(UserError, match="no LoRA lies beside adapter_config.json"):
        VLM.from_pretrained(lora, vision=clip, llm=under)


@torch.no_grad()
def test_a_tied_llava_opens_whose_flag_stands_only_at_the_top_of_its_config(tmp_path):
    config = llava_config(TINY, "float32") | {"tie_word_embeddings": True}
    theirs = lively(tr.LlavaForConditionalGeneration(tr.LlavaConfig(**config)))
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["tie_word_embeddings"] is False
    tokens = torch.tensor([[1, 5, 6, 7]])
    close(VLM.from_pretrained(tmp_path)(tokens), theirs(input_ids=tokens).logits)


# ---- Prismatic ---------------------------------------------------------------------------------------------


@pytest.fixture
def prism(tmp_path):
    """Two reference towers, a connector and a Llama, as Prismatic writes them: towers outside."""
    exact = SIZE | dict(hidden_act="gelu")  # as Prismatic ran it
    siglip = tr.SiglipVisionModel(tr.SiglipVisionConfig(**exact))
    dims = dict(vocab_size=32064, hidden_size=128, intermediate_size=32, num_hidden_layers=1)
    llama = tr.LlamaForCausalLM(tr.LlamaConfig(**dims, num_attention_heads=1, rms_norm_eps=1e-5))
    layers = nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128), nn.GELU(), nn.Linear(128, 128)
    p = SimpleNamespace(dino=lively(TOWERS["registers"]()), siglip=lively(siglip), llama=lively(llama))
    p.fused = lively(nn.Sequential(*layers))
    p.dino.save_pretrained(tmp_path / "dino")
    p.siglip.save_pretrained(tmp_path / "siglip")
    p.towers = f"{tmp_path / 'dino'},{tmp_path / 'siglip'}"
    p.config = PRISM | {
        "vision_backbone_id": "dinosiglip-vit-so-56px",
        "llm_backbone_id": "vicuna-v15-7b",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
    }
    p.state = {
        "projector": {f"projector.{name}": t for name, t in p.fused.state_dict().items()},
        "llm_backbone": {f"llm.{name}": t for name, t in p.llama.state_dict().items()},
    }
    p.folder = write_prismatic(tmp_path / "prism", p.config, p.state)
    p.tokens = torch.tensor([[1] + [32001] * 16 + [450, 451]] * 2)
    p.raw = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    return p


def normalized(raw, mean, std):
    return (raw / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@torch.no_grad()
def test_prismatic_is_two_reference_towers_a_connector_and_a_llama(prism):
    with pytest.raises(UserError, match="dinosiglip-vit-so-56px.*--vision DIR,DIR"):
        VLM.from_pretrained(prism.folder)
    vlm = VLM.from_pretrained(prism.folder, vision=prism.towers)
    assert (vlm.cfg.image_token, vlm.cfg.pad_token) == (32001, 32000)
    assert (vlm.cfg.template, vlm.cfg.image_mode) == ("prism_vicuna", "resize")
    dino = features_of(prism.dino, normalized(prism.raw, IMAGENET_MEAN, IMAGENET_STD))
    siglip = features_of(prism.siglip, normalized(prism.raw, (0.5,) * 3, (0.5,) * 3))
    x = prism.llama.model.embed_tokens(prism.tokens)
    x[:, 1:17] = prism.fused(torch.cat([dino, siglip], dim=2))
    close(vlm(prism.tokens, prism.raw), prism.llama(inputs_embeds=x).logits)


@torch.no_grad()
def test_prismatic_opens_with_its_towers_inside_and_as_openvla_wrote_it(tmp_path, prism):
    vlm = VLM.from_pretrained(prism.folder, vision=prism.towers)
    dino, siglip = timm_names(vlm.vision, folded=True), timm_names(vlm.vision2)
    inside = {f"dino_featurizer.{name}": t for name, t in dino.items()}
    inside |= {f"siglip_featurizer.{name}": t for name, t in siglip.items()}
    write_prismatic(prism.folder, prism.config, prism.state | {"vision_backbone": inside})
    close(VLM.from_pretrained(prism.folder)(prism.tokens, prism.raw), vlm(prism.tokens, prism.raw))

    # OpenVLA's: fc1, fc2, fc3, the second tower "fused", and layer-scale under another word.
    layers = {"0": "fc1", "2": "fc2", "4": "fc3"}
    names = {f"projector.{layers[name[0]]}{name[1:]}": t for name, t in prism.fused.state_dict().items()}
    names |= {f"language_model.{name}": t for name, t in prism.llama.state_dict().items()}
    dino = {name.replace("gamma", "scale_factor"): t for name, t in dino.items()}
    names |= {f"vision_backbone.featurizer.{name}": t for name, t in dino.items()}
    names |= {f"vision_backbone.fused_featurizer.{name}": t for name, t in siglip.items()}
    folder = write(tmp_path / "hf", {"model_type": "prismatic", **prism.config}, names)
    close(VLM.from_pretrained(folder)(prism.tokens, prism.raw), vlm(prism.tokens, prism.raw))


@torch.no_grad()
def test_two_towers_are_saved_in_our_own_layout_and_keep_prismatics_ids(tmp_path, prism):
    vlm = VLM.from_pretrained(prism.folder, vision=prism.towers)
    vlm.save_pretrained(tmp_path / "ours")
    again = VLM.from_pretrained(tmp_path / "ours")
    assert again.cfg == vlm.cfg and same(again, vlm)
    if LLAMA.exists():
        (prism.folder / "tokenizer.model").write_bytes(LLAMA.read_bytes())
        assert convert(prism.folder, tmp_path / "out", "--vision", prism.towers) == 0
        for tok in Tokenizer(prism.folder), Tokenizer(tmp_path / "out"):
            assert (tok.image, tok.pad) == (32001, 32000)


# ---- InternVL ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("big", [False, True])
def test_internvl_equals_transformers_port_renamed(tmp_path, big):
    folder, theirs = internvl(tmp_path / "m", big)
    vlm = VLM.from_pretrained(folder)
    assert (vlm.cfg.image_token, vlm.cfg.pad_token) == (89, 2)
    assert (vlm.cfg.template, vlm.cfg.vision.n_token) == ("internvl2_5", 4)
    tokens = torch.tensor([[1, 5] + [89] * 4 + [7, 8]] * 2)
    close(vlm(tokens, PIXELS), theirs(input_ids=tokens, pixel_values=PIXELS).logits)
    vlm.save_pretrained(tmp_path / "ours")
    assert same(VLM.from_pretrained(tmp_path / "ours"), vlm)


@torch.no_grad()
@pytest.mark.parametrize("S", [28, 84])
def test_internvls_positions_are_resized_as_its_own_code_does_at_run_time(tmp_path, S):
    folder, theirs = internvl(tmp_path / "m")
    change_config(force_image_size=S)(folder)
    vlm = VLM.from_pretrained(folder)
    tokens = torch.tensor([[1, 5] + [89] * vlm.cfg.vision.n_token + [7, 8]])
    pixels = torch.randn(1, 3, S, S)
    close(vlm(tokens, pixels), theirs(input_ids=tokens, pixel_values=pixels).logits)


# ---- templates ---------------------------------------------------------------------------------------------

LLAVA = {"model_type": "llava", "vision_config": {}, "text_config": {}}
NEXT = {"model_type": "llava_next", "vision_config": {"image_size": 336}}
ORIGINAL = {"model_type": "llava_llama", "mm_hidden_size": 1024}
INTERN = {"model_type": "internvl_chat", "vision_config": {"model_type": "vit"}, "llm_config": {}}


@pytest.mark.parametrize(
    "config, template",
    [
        (LLAVA, "vicuna_v1"),
        (LLAVA | {"template": "llava_llama_2"}, "llava_llama_2"),
        (ORIGINAL, "llava_v1"),
        (ORIGINAL | {"mm_projector_type": "mlp2x_gelu"}, "vicuna_v1"),
        (ORIGINAL | {"template": "llava_v0"}, "llava_v0"),
        (ORIGINAL | {"mm_projector_type": "mlp2x_gelu", "model_type": "llava_mistral"}, "mistral_instruct"),
        (NEXT | {"text_config": {}}, "vicuna_v1"),
        (NEXT | {"text_config": {"model_type": "mistral"}}, "mistral_instruct"),
        (INTERN, "internvl2_5"),
        (INTERN | {"template": "internlm2-chat"}, "internlm2-chat"),
        (INTERN | {"template": "Hermes-2"}, "Hermes-2"),
    ],
)
def test_a_config_names_its_template(tmp_path, config, template):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path, {}, [VisionConfig()]).template == template


@pytest.mark.parametrize(
    "llm, template",
    [
        ("vicuna-v15-13b", "prism_vicuna"),
        ("llama2-7b-pure", "prism_pure"),
        ("llama2-13b-chat", "prism_llama_2"),
        ("mistral-v0.1-7b-pure", "prism_pure"),
        ("mistral-v0.1-7b-instruct", "prism_mistral"),
    ],
)
def test_prismatics_language_model_names_its_template(tmp_path, llm, template):
    folder = prismatic(tmp_path)
    change_config("model", llm_backbone_id=llm)(folder)
    assert VLM.from_pretrained(folder).cfg.template == template


# ---- number formats and memory -----------------------------------------------------------------------------


def test_a_file_from_before_torch_wrote_zips_opens_too(tmp_path):
    vlm = narrow()
    folder = original(tmp_path / "m", vlm, tower=True)
    file = folder / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    assert same(VLM.from_pretrained(folder), vlm)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_wish_weights_stay_as_stored_but_a_cpu_computes_float16_in_bfloat16(tmp_path, stored):
    lively(VLM(TINY)).to(stored).save_pretrained(tmp_path)
    opened = torch.bfloat16 if stored == torch.float16 else stored
    assert {p.dtype for p in VLM.from_pretrained(tmp_path, dtype=None).parameters()} == {opened}
    assert {p.dtype for p in VLM.from_pretrained(tmp_path).parameters()} == {torch.float32}


OPEN_AND_MEASURE = """
import re, sys, threading, torch, model

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

import support.weights
before = peak = anonymous()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
vlm = model.VLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
done.set()
watcher.join()
print(peak - before, sum(2 * p.numel() for p in vlm.parameters()), "torch._dynamo" in sys.modules)
"""


def test_opening_a_model_holds_it_once_and_does_not_import_the_compiler(tmp_path):
    """float16 .bin to bfloat16: what is mapped of the file is the system's to drop, and is not counted."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from Linux's /proc")
    decoder = DecoderConfig(32064, n_layer=1, n_head=8, n_kv_head=1, n_embd=1024, head_dim=32, n_hidden=64)
    vlm = VLM(replace(TINY, decoder=decoder))
    tensors = {rename(name, TO_LLAVA): t.half() for name, t in vlm.state_dict().items()}
    write(tmp_path, llava_config(vlm.cfg, "float16"), tensors, "pytorch_model.bin")
    command = [sys.executable, "-c", OPEN_AND_MEASURE, tmp_path]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    grown, size, compiler = said.split()
    assert int(grown) < int(size) + 25e6 and compiler == "False"


# ---- convert and info --------------------------------------------------------------------------------------


@torch.no_grad()
def test_convert_gives_transformers_the_original_layout_with_rows_for_the_image_token(tmp_path):
    decoder = replace(TINY.decoder, vocab_size=32000)
    vlm = lively(VLM(replace(TINY, decoder=decoder, image_token=32000, pad_token=32001)))
    original(tmp_path / "m", vlm, tower=True)
    assert convert(tmp_path / "m", tmp_path / "hf") == 0
    theirs = tr.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.tensor([[1] + [32000] * 16 + [5, 6]])
    found = theirs(input_ids=tokens, pixel_values=PIXELS[:1]).logits
    close(vlm(tokens, PIXELS[:1]), found[..., :32000])
    assert theirs.lm_head.weight.shape[0] == 32064
    assert convert(tmp_path / "m", tmp_path / "m") == 1                     # not over what is read


@torch.no_grad()
def test_convert_merges_a_lora_and_transformers_opens_it(tmp_path):
    vlm = narrow()
    clip, base = clip_folder(tmp_path / "clip", vlm), original(tmp_path / "base", vlm)
    lora, A, B = original_lora(tmp_path / "lora", base, vlm)
    flags = ["--vision", clip, "--llm", base]
    assert info(lora, *flags) == 0
    assert convert(lora, tmp_path / "hf", *flags) == 0
    theirs = tr.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    weight = vlm.decoder.layers[0].self_attn.o_proj.weight + 4 / 2 * B @ A
    close(theirs.model.language_model.layers[0].self_attn.o_proj.weight, weight)


def test_info_says_what_a_model_is_made_of(tmp_path, capsys):
    assert info("llava-1.5-7b") == 0
    said = capsys.readouterr().out
    for n in 303_507_456, 20_979_712, 6_738_415_616 + 2 * 64 * 4096:
        assert f"{n:,} parameters" in said
    assert "576 visual tokens" in said
    assert info(original(tmp_path / "m", narrow(), tower=True)) == 0
    assert info(clip_folder(tmp_path / "clip", narrow())) == 0
    assert info(tmp_path / "none") == 1
    assert "neither a directory nor a preset" in capsys.readouterr().err


def test_info_wants_the_tower_of_a_model_published_without(tmp_path, capsys):
    vlm = narrow()
    folder, clip = original(tmp_path / "m", vlm), clip_folder(tmp_path / "clip", vlm)
    assert info(folder) == 1
    assert "(its config names openai/clip); give the directory" in capsys.readouterr().err
    assert info(folder, "--vision", clip) == 0
    assert f"{count(vlm):,} parameters" in capsys.readouterr().out


# ---- damaged -----------------------------------------------------------------------------------------------


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def change_config(*path, **changes):
    """Change fields of the object at this path; None takes a field away."""

    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        inner = config
        for name in path:
            inner = inner[name]
        inner.update(changes)
        for name, value in changes.items():
            if value is None:
                del inner[name]
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def eight_bits(word):
    """Store the first tensor with this word in its name as int8."""

    def spoil(folder):
        files = [*folder.rglob("*.safetensors"), *folder.rglob("*.bin"), *folder.rglob("*.pt")]
        is_safe = files[0].suffix == ".safetensors"
        tensors = load_file(files[0]) if is_safe else torch.load(files[0], weights_only=True)
        place = tensors["model"]["llm_backbone"] if "model" in tensors else tensors
        name = next(name for name in place if word in name)
        place[name] = place[name].to(torch.int8)
        if is_safe:
            save_file(tensors, files[0])
        else:
            torch.save(tensors, files[0])

    return spoil


def lose_shard(folder):
    first, second = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    (folder / "pytorch_model.bin").rename(folder / first)
    index = {"weight_map": {"model.norm.weight": first, "lm_head.weight": second}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def lose_words(folder):
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del tensors["model.embed_tokens.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def llava(folder):
    return original(folder, narrow(), tower=True)


def intern_vl(folder):
    return internvl(folder)[0]


BIN, PT, ST = "pytorch_model.bin", "checkpoints/latest-checkpoint.pt", "model.safetensors"
DAMAGES = {                          # the model, what happens to it, what is said
    "cut": (llava, cut(BIN), f"{BIN}: "),
    "empty": (llava, lambda d: (d / BIN).write_bytes(b""), f"{BIN}: damaged"),
    "code": (llava, lambda d: torch.save({"x": Evil()}, d / BIN), f"{BIN}: .*more than tensors"),
    "no weights": (llava, lambda d: (d / BIN).unlink(), f"holds none of .*{BIN}"),
    "no shard": (llava, lose_shard, "pytorch_model-00002-of-00002.bin: cannot be read"),
    "no words": (llava, lose_words, "1 missing, 0 unused, such as decoder.embed_tokens.weight"),
    "8 bits": (llava, eight_bits("gate_proj"), "mlp.gate_proj.weight is torch.int8"),
    "start-end tokens": (llava, change_config(mm_use_im_start_end=True), "mm_use_im_start_end is True"),
    "tiles": (llava, change_config(image_aspect_ratio="anyres_max_9"), "'anyres_max_9' is unknown"),
    "biases": (llava, change_config(attention_bias=True), "attention_bias is True"),
    "no connector's kind": (llava, change_config(mm_projector_type=None), "do not fit this architecture"),
    "a tower alone": (llava, lambda d: write(d, clip_json(TINY.vision), {}), "is 'clip_vision_model'; only"),
    "a broken processor": (
        llava,
        lambda d: (d / "processor_config.json").write_text('{"image_processor": 5}'),
        "processor_config.json: damaged",
    ),
    "another broken processor": (
        llava,
        lambda d: (d / "preprocessor_config.json").write_text("[]"),
        "preprocessor_config.json: a list",
    ),
    "prismatic cut": (prismatic, cut(PT), "latest-checkpoint.pt: damaged"),
    "prismatic with phi-2": (prismatic, change_config("model", llm_backbone_id="phi-2-3b"), "only vicuna"),
    "prismatic in 8 bits": (prismatic, eight_bits("o_proj"), "o_proj.weight is torch.int8"),
    "internvl cut": (intern_vl, cut(ST), f"{ST}: damaged"),
    "internvl in 8 bits": (intern_vl, eight_bits("attention.wo"), "self_attn.o_proj.weight is torch.int8"),
    "internvl with qwen": (intern_vl, change_config("llm_config", model_type="qwen2"), "'qwen2'"),
}
for field in "vision_backbone_id", "arch_specifier", "llm_backbone_id", "image_resize_strategy":
    lose_field = change_config("model", **{field: None})
    DAMAGES[f"prismatic without {field}"] = prismatic, lose_field, f"config.json: .*'{field}'"
for field in "llm_config", "vision_config":
    lose_field = change_config(**{field: None})
    DAMAGES[f"internvl without {field}"] = intern_vl, lose_field, f"config.json: .*'{field}'"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_one_error_that_names_it(tmp_path, damage):
    make, spoil, says = DAMAGES[damage]
    folder = make(tmp_path / "m")
    VLM.from_pretrained(folder)
    spoil(folder)
    with pytest.raises(UserError, match=f"^{folder}.*{says}") as error:
        VLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


ODD_VALUES = [True, -1, 10**9, "x", []]


def places(content, path=()):
    """Where all values of a JSON object stand."""
    for name, value in content.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


@pytest.mark.parametrize("connector", ["linear", "mlp2x_gelu"], ids=["own layout", "llava-hf"])
def test_whatever_a_config_says_a_model_opens_or_one_line_names_it(tmp_path, connector):
    folder = tmp_path / "m"
    VLM(replace(TINY, connector=connector)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    refused = 0
    for *path, name in places(config):
        for value in ODD_VALUES:
            changed = json.loads(json.dumps(config))
            inner = changed
            for step in path:
                inner = inner[step]
            inner[name] = value
            (folder / "config.json").write_text(json.dumps(changed))
            try:
                VLM.from_pretrained(folder)
            except UserError as error:
                assert str(folder) in str(error) and "\n" not in str(error), (path, name, value)
                refused += 1
    assert refused > 50


ODD_TENSORS = {
    "no dimension": lambda t: torch.tensor(1.0),
    "one dimension": lambda t: t.flatten().clone(),
    "nothing": lambda t: torch.zeros(0),
    "half": lambda t: t[: len(t) // 2].clone(),
    "whole numbers": lambda t: t.to(torch.int64),
}


@pytest.mark.parametrize("odd", ODD_TENSORS)
@pytest.mark.parametrize("make", [llava, intern_vl])
def test_whatever_a_tensor_looks_like_a_model_opens_or_one_line_names_it(tmp_path, make, odd):
    folder = make(tmp_path / "m")
    file = next(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    read, save = (torch.load, torch.save) if file.suffix == ".bin" else (load_file, save_file)
    tensors = read(file)
    refused = 0
    for name in list(tensors)[::3]:
        save(tensors | {name: ODD_TENSORS[odd](tensors[name])}, file)
        try:
            VLM.from_pretrained(folder)
        except UserError as error:
            assert str(folder) in str(error) and "\n" not in str(error), name
            refused += 1
    assert refused > 5


def test_a_model_type_that_is_no_text_is_one_clear_error(tmp_path, capfd):
    (tmp_path / "config.json").write_text('{"model_type": ["llava"]}')
    assert info(tmp_path) == 1
    assert capfd.readouterr().err.startswith(f"error: {tmp_path}")


def test_shards_may_lie_in_a_folder_of_their_own(tmp_path):
    vlm = narrow()
    folder = original(tmp_path / "m", vlm, tower=True)
    tensors = torch.load(folder / BIN, weights_only=True)
    (folder / BIN).unlink()
    write(folder / "shards", None, tensors, BIN)
    index = {"weight_map": {name: f"shards/{BIN}" for name in tensors}}
    (folder / f"{BIN}.index.json").write_text(json.dumps(index))
    assert same(VLM.from_pretrained(folder), vlm)


def test_what_is_wrong_with_a_decoders_or_an_adapters_config_is_said_with_its_file(tmp_path, capfd):
    write(tmp_path / "llm", llama_json(TINY.decoder) | {"hidden_act": "relu"}, {})
    assert info(tmp_path / "llm") == 1
    assert f"{tmp_path / 'llm/config.json'}: hidden_act is 'relu'" in capfd.readouterr().err
    base = original(tmp_path / "base", narrow(), tower=True)
    lora, _, _ = original_lora(tmp_path / "lora", base, narrow())
    for wrong in '{"r": 2, "lora_alpha": "x"}', '{"r": 2, "lora_alpha": 4, "alpha_pattern": {"q_proj": 8}}':
        (lora / "adapter_config.json").write_text(wrong)
        with pytest.raises(UserError, match=f"^{lora}/adapter_config.json: .*('x'|'q_proj')"):
            VLM.from_pretrained(lora, llm=str(base))


def test_weights_that_may_not_be_read_are_not_called_absent(tmp_path, monkeypatch):
    VLM(TINY).save_pretrained(tmp_path)

    def open_but_weights(path, *how, **more):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        return open(path, *how, **more)

    monkeypatch.setattr(Path, "open", open_but_weights)                     # root may read everything
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read \(Permission denied\)"):
        VLM.from_pretrained(tmp_path)


def test_the_umask_decides_who_may_read_the_weights(tmp_path):
    before = os.umask(0o027)
    try:
        VLM(TINY).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_a_tokenizer_of_another_model_is_one_clear_error():
    check_tokenizer(narrow(), SimpleNamespace(path="t", n_text=320, image=32000))
    for n_text, image in (321, 32000), (320, 320):
        with pytest.raises(UserError, match="t: has .* pieces .* of different models"):
            check_tokenizer(narrow(), SimpleNamespace(path="t", n_text=n_text, image=image))


# ---- a preset's ingredients --------------------------------------------------------------------------------


@torch.no_grad()
def test_a_preset_is_built_from_two_towers_of_other_families_trains_and_is_saved(tmp_path):
    for kind in "registers", "siglip vision":
        lively(TOWERS[kind]()).save_pretrained(tmp_path / kind.split()[0])
    towers = f"{tmp_path / 'registers'},{tmp_path / 'siglip'}"
    cfg = train.TrainConfig(model="toy", vision=towers, llm=start.TOY["llm"], image_size=84, stage="pretrain")
    vlm, tok = start.build(cfg)
    assert (vlm.cfg.vision.n_token, vlm.cfg.feature_width) == (36, 128)  # 6 x 6 patches, resized from 4 x 4
    assert vlm.cfg.connector == "fused_gelu"
    train.make_trainable(vlm, replace(cfg, train="connector,vision"))
    trained = {name.split(".")[0] for name, p in vlm.named_parameters() if p.requires_grad}
    assert trained == {"connector", "vision", "vision2"}
    save_processor(tmp_path / "m", tok.path, vlm.cfg)
    vlm.save_pretrained(tmp_path / "m")
    again, same_tok = start.build(train.TrainConfig(model=str(tmp_path / "m")))
    assert again.cfg == vlm.cfg and same(again, vlm) and same_tok.image == tok.image
