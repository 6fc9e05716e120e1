"""Public weights of every layout: written by the reference libraries (or in their words) with tiny random numbers, read here, compared."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import model
import train
from conversation import Tokenizer
from model import Connector, Decoder, DecoderConfig, VLM, VLMConfig
from support.cli import UserError, run
from support.export import clip_json, clip_name, llama_json
from support.io import read_json
from support.weights import check_tokenizer, decoder_config, load_connector, load_decoder, load_vision, read_tower, resize_positions
from vision import IMAGENET_MEAN, IMAGENET_STD, ViT, VisionConfig
import support.checkpoint as support_checkpoint
import tools.weights as tools_weights

transformers = pytest.importorskip("transformers")
LLAMA = Path(__file__).parents[2] / "shared" / "tokenizers" / "llama2.model"
SIZE = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=1, intermediate_size=128, image_size=56, patch_size=14)
DINO = {k: v for k, v in SIZE.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
TINY = VLMConfig(VisionConfig(56, 14, 64, 3, 1, 128), DecoderConfig(vocab_size=96, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, n_hidden=48),
                 image_token=80, pad_token=81)
PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
close = lambda a, b: assert_close(a, b, rtol=1e-4, atol=1e-4)


def lively(module, std=0.15):
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.eval()


def size(module):
    return sum(p.numel() for p in module.parameters())


def write(folder, config, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    save_file(tensors, folder / name) if name.endswith(".safetensors") else torch.save(tensors, folder / name)
    return folder


def open_tower(path, **changes):
    vit = ViT(replace(read_tower(path), **changes))
    load_vision(vit, path)
    return vit.eval()


# ---- towers ---------------------------------------------------------------------------------------------------------

def clip_and_siglip():
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=9)
    tr = transformers
    return {"clip": tr.CLIPModel(tr.CLIPConfig(vision_config=SIZE, text_config=text)), "clip vision": tr.CLIPVisionModel(tr.CLIPVisionConfig(**SIZE)),
            "siglip": tr.SiglipModel(tr.SiglipConfig(vision_config=SIZE, text_config=text)), "siglip vision": tr.SiglipVisionModel(tr.SiglipVisionConfig(**SIZE)),
            "dinov2": tr.Dinov2Model(tr.Dinov2Config(**DINO)), "registers": tr.Dinov2WithRegistersModel(tr.Dinov2WithRegistersConfig(**DINO)),
            "vit": tr.ViTModel(tr.ViTConfig(**SIZE)), "vit classes": tr.ViTForImageClassification(tr.ViTConfig(**SIZE))}


def features_of(theirs):
    tower = getattr(theirs, "vision_model", getattr(theirs, "vit", theirs))
    kind = tower.config.model_type
    prefix = 0 if "siglip" in kind else 5 if "registers" in kind else 1
    return tower(PIXELS, output_hidden_states=True).hidden_states[-2][:, prefix:]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "clip vision", "siglip", "siglip vision", "dinov2", "registers", "vit", "vit classes"])
def test_a_tower_that_transformers_wrote_sees_the_same(tmp_path, capsys, kind):
    theirs = lively(clip_and_siglip()[kind])
    theirs.save_pretrained(tmp_path)
    ours = open_tower(tmp_path)
    close(ours(PIXELS), features_of(theirs))
    n = len(load_file(tmp_path / "model.safetensors"))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"of {n} tensors from" in line and "0 missing, 0 unused" in line
    assert ("text_model" in line) == (kind in ("clip", "siglip"))


def timm_names(vit, folded=False):
    """Our tower in timm's layout: q, k and v fused, and DINOv2 with registers with the class token's position folded in."""
    out, state = {}, vit.state_dict()
    for name, t in state.items():
        for ours, theirs in (("patch.", "patch_embed.proj."), ("pre_norm.", "norm_pre."), (".attn.out_proj.", ".attn.proj."), (".scale1", ".ls1.gamma"),
                             (".scale2", ".ls2.gamma"), ("registers", "reg_token"), ("class_token", "cls_token")):
            name = name.replace(ours, theirs)
        if ".q_proj." in name:
            t = torch.cat([state[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")])
        if "k_proj" not in name and "v_proj" not in name:
            out[{"pos": "pos_embed"}.get(name, name.replace("q_proj", "qkv"))] = t[None] if name in ("pos", "reg_token") else t[None, None] if name == "cls_token" else t
    if folded:
        out["cls_token"], out["pos_embed"] = out["cls_token"] + out["pos_embed"][:, :1], out["pos_embed"][:, 1:]
    return out


OPENAI = [("patch_embed.proj.", "conv1."), ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"), ("norm_pre.", "ln_pre."),
          ("blocks.", "transformer.resblocks."), (".norm1.", ".ln_1."), (".norm2.", ".ln_2."), ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj"),
          ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]


@torch.no_grad()
def test_timm_open_clip_and_openai_names_are_the_same_towers(tmp_path):
    towers = {kind: lively(clip_and_siglip()[kind]) for kind in ("clip vision", "siglip vision", "registers", "dinov2", "vit")}
    for kind, theirs in towers.items():
        theirs.save_pretrained(tmp_path / kind)
        hf = open_tower(tmp_path / kind)
        tensors = timm_names(hf, folded=kind == "registers")
        activation = {"activation": "gelu_tanh"} if "siglip" in kind else {}          # the file does not say; timm's is the exact GELU
        eps = {"norm_eps": 1e-12} if kind == "vit" else {}
        file = write(tmp_path / "timm", {"architecture": "vit"}, tensors | {"head.weight": torch.zeros(3, 64)})
        assert read_tower(file) == replace(hf.cfg, activation=read_tower(file).activation, norm_eps=read_tower(file).norm_eps)
        close(open_tower(file, **activation, **eps)(PIXELS), features_of(theirs))
        if "siglip" in kind:
            extra = {"text.ln_final.weight": torch.zeros(3), "logit_scale": torch.zeros(()), "visual.trunk.attn_pool.q.weight": torch.zeros(3, 3)}
            file = write(tmp_path / "open_clip", {"x": 1}, {"visual.trunk." + k: v for k, v in tensors.items()} | extra, "open_clip_pytorch_model.bin")
            close(open_tower(file, **activation)(PIXELS), features_of(theirs))
        if "clip" in kind and "siglip" not in kind:
            renamed = {}
            for name, t in tensors.items():
                for a, b in OPENAI:
                    name = name.replace(a, b)
                name = "ln_post." + name[5:] if name.startswith("norm.") else name
                renamed["visual." + name] = t.flatten(0, -1 if name == "class_embedding" else -2) if "embedding" in name else t
            extra = {"transformer.resblocks.0.ln_1.weight": torch.zeros(3), "positional_embedding": torch.zeros(7, 3), "visual.proj": torch.zeros(3, 3)}
            file = write(tmp_path, None, renamed | extra, "clip.pt") / "clip.pt"
            close(open_tower(file)(PIXELS), features_of(theirs))


@torch.no_grad()
def test_a_position_table_is_resized_as_dinov2_with_registers_does_at_run_time(tmp_path):
    theirs = lively(clip_and_siglip()["registers"])
    theirs.save_pretrained(tmp_path)
    for S in (42, 98):
        pixels = torch.randn(1, 3, S, S)
        close(open_tower(tmp_path, image_size=S)(pixels), theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 5:])


def test_a_resized_table_keeps_the_class_row_and_a_constant():
    cfg = VisionConfig(image_size=98, patch_size=14, n_embd=4, n_head=1)
    pos = torch.cat([torch.arange(4.0)[None], torch.full((16, 4), 0.3)])
    assert_close(resize_positions(pos, cfg), torch.cat([pos[:1], torch.full((49, 4), 0.3)]))


# ---- language models ------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral", "tied", ".bin in shards"])
def test_a_language_model_alone_gives_the_same_logits(tmp_path, capsys, kind):
    tr, dims = transformers, dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    theirs = lively(tr.MistralForCausalLM(tr.MistralConfig(**dims, head_dim=8, sliding_window=16)) if kind == "mistral"
                    else tr.LlamaForCausalLM(tr.LlamaConfig(**dims, tie_word_embeddings=kind == "tied", rms_norm_eps=1e-5)))
    theirs.save_pretrained(tmp_path)
    if "bin" in kind:                                                       # as Vicuna lies on the hub
        tensors = load_file(tmp_path / "model.safetensors") | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
        for file in set(files.values()):
            write(tmp_path, None, {n: t for n, t in tensors.items() if files[n] == file}, file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
        (tmp_path / "model.safetensors").unlink()
    cfg = decoder_config(read_json(tmp_path / "config.json"))
    assert cfg.block_size == (16 if kind == "mistral" else 2048)            # one window
    decoder, tokens = Decoder(cfg), torch.randint(96, (2, 14))
    load_decoder(decoder, tmp_path)
    close(decoder.lm_head(decoder(decoder.embed_tokens(tokens))), theirs(tokens).logits)
    if "bin" in kind:
        assert "loaded 21 of 23 tensors" in (said := capsys.readouterr().err) and "2 of no use here (2 inv_freq)" in said


def internlm2(state, cfg):
    """A Llama's tensors in InternLM2's words, key-value head by key-value head: its queries, its key, its value."""
    out = {}
    for name, t in state.items():
        for a, b in (("embed_tokens", "tok_embeddings"), ("lm_head", "output"), ("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1"),
                     ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2"), ("input_layernorm", "attention_norm"),
                     ("post_attention_layernorm", "ffn_norm")):
            name = name.replace(a, b)
        if "q_proj" in name:
            q, k, v = (state[name.replace("q_proj", p)].split(cfg.head_dim) for p in ("q_proj", "k_proj", "v_proj"))
            g = cfg.n_head // cfg.n_kv_head
            name, t = name.replace("self_attn.q_proj", "attention.wqkv"), torch.cat([torch.cat([*q[g * i : g * i + g], k[i], v[i]]) for i in range(cfg.n_kv_head)])
        if "k_proj" not in name and "v_proj" not in name:
            out[name] = t
    return out


LM2 = dict(model_type="internlm2", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
           max_position_embeddings=2048, rms_norm_eps=1e-5, bias=False, rope_theta=10000, rope_scaling={"type": "dynamic", "factor": 2.0})


@torch.no_grad()
def test_internlm2_is_a_llama_whose_queries_keys_and_values_lie_by_head(tmp_path):
    theirs = lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_json(replace(TINY.decoder, block_size=2048)))))
    write(tmp_path, LM2, internlm2(theirs.state_dict(), TINY.decoder), "pytorch_model.bin")
    decoder, tokens = Decoder(decoder_config(LM2)), torch.randint(96, (2, 14))
    load_decoder(decoder, tmp_path)
    close(decoder.lm_head(decoder(decoder.embed_tokens(tokens))), theirs(tokens).logits)


# ---- LLaVA ----------------------------------------------------------------------------------------------------------

def parts(vlm, part):
    return {name.removeprefix(part + "."): t for name, t in vlm.state_dict().items() if name.startswith(part + ".")}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


PROJECTOR = {"linear_1": "0", "linear_2": "2", "linear_3": "4"}


def projector(vlm, prefix="model.mm_projector."):
    if vlm.cfg.connector == "linear":
        return {prefix + name.removeprefix("linear_1."): t for name, t in parts(vlm, "connector").items()}
    return {prefix + PROJECTOR[name[:8]] + name[8:]: t for name, t in parts(vlm, "connector").items()}


def original(folder, vlm, tower=False, **config):
    """liuhaotian's layout: 80 rows, so that <image> lies beyond the table; .bin with inv_freq; a finetuned tower inside or none."""
    d = vlm.cfg.decoder
    names = {("" if n.startswith("lm_head") else "model.") + n: t for n, t in parts(vlm, "decoder").items()}
    names |= projector(vlm) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    if tower:
        names |= {"model.vision_tower.vision_tower.vision_model." + clip_name(n): t for n, t in parts(vlm, "vision").items()}
    kind = {} if vlm.cfg.connector == "linear" else {"mm_projector_type": vlm.cfg.connector}
    return write(folder, llama_json(d) | {"model_type": "llava", "mm_hidden_size": 64, "mm_vision_tower": "openai/clip", "mm_vision_select_layer": -2,
                                          "image_aspect_ratio": "pad", "mm_use_im_start_end": False} | kind | config, names, "pytorch_model.bin")


def narrow(connector="mlp2x_gelu"):
    return lively(VLM(replace(TINY, connector=connector, decoder=replace(TINY.decoder, vocab_size=320), image_token=32000, pad_token=32001)))


@torch.no_grad()
@pytest.mark.parametrize("connector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("tower", [False, True])
def test_the_original_layout_opens_with_its_tower_or_with_one_given(tmp_path, capsys, connector, tower):
    vlm, clip = narrow(connector), tmp_path / "clip"
    write(clip, clip_json(vlm.cfg.vision), {"vision_model." + clip_name(n): t for n, t in parts(vlm, "vision").items()})
    folder = original(tmp_path / "m", vlm, tower)
    if not tower:
        with pytest.raises(UserError, match="holds no vision tower .*openai/clip.*--vision DIR"):
            VLM.from_pretrained(folder)
    again = VLM.from_pretrained(folder, vision=None if tower else str(clip))
    assert same(again, vlm) and again.cfg.template == ("llava_v1" if connector == "linear" else "vicuna_v1")
    assert "1 inv_freq" in capsys.readouterr().err
    tokens, pixels = torch.tensor([[1] + [32000] * 16 + [5, 6], [1, 3] + [32001] * 17]), torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)
    assert again(tokens, pixels).shape == (2, 19, 320) and again.generate(tokens[:1], pixels, max_new_tokens=3).max() < 320
    with pytest.raises(UserError, match="has its own vision tower"):
        VLM.from_pretrained(original(tmp_path / "m", vlm, True), vision=str(clip))
    write(tmp_path, None, projector(vlm), "mm_projector.bin")
    fresh = Connector(vlm.cfg)
    load_connector(fresh, tmp_path / "mm_projector.bin")
    assert same(fresh, vlm.connector)


@torch.no_grad()
@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_lora_is_merged_over_its_base(tmp_path, file):
    base, tuned = narrow(), narrow()
    write(tmp_path / "clip", clip_json(base.cfg.vision), {clip_name(n): t for n, t in parts(base, "vision").items()})
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    tuned.decoder.layers[1].self_attn.q_proj.weight += 8 / 2 * b @ a
    nn.init.normal_(tuned.connector.linear_2.bias)
    original(tmp_path / "base", base)
    config = json.loads((tmp_path / "base/config.json").read_text())
    lora = write(tmp_path / "lora", config, {f"base_model.model.model.layers.1.self_attn.q_proj.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}, file)
    write(lora, None, projector(tuned, "base_model.model.model.mm_projector."), "non_lora_trainables.bin")
    (lora / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": "lmsys/vicuna"}))
    with pytest.raises(UserError, match="LoRA over 'lmsys/vicuna'.*--llm DIR"):
        VLM.from_pretrained(lora, vision=str(tmp_path / "clip"))
    again = VLM.from_pretrained(lora, vision=str(tmp_path / "clip"), llm=str(tmp_path / "base"))
    for name, t in tuned.state_dict().items():
        close(again.state_dict()[name], t)
    write(lora, None, {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": a}, file)
    with pytest.raises(UserError, match="1 of its 1 tensors belong to nothing"):
        VLM.from_pretrained(lora, vision=str(tmp_path / "clip"), llm=str(tmp_path / "base"))


# ---- Prismatic ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_prismatic_is_two_reference_towers_a_connector_and_a_llama(tmp_path):
    dino, siglip = (lively(clip_and_siglip()[kind]) for kind in ("registers", "siglip vision"))
    siglip = lively(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZE | dict(hidden_act="gelu"))))   # exact, as Prismatic ran it
    dino.save_pretrained(tmp_path / "dino")
    siglip.save_pretrained(tmp_path / "siglip")
    llama = lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32064, hidden_size=128, intermediate_size=32, num_hidden_layers=1,
                                                                          num_attention_heads=1, rms_norm_eps=1e-5)))
    fused = lively(nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128), nn.GELU(), nn.Linear(128, 128)))
    folder = tmp_path / "prism"
    (folder / "checkpoints").mkdir(parents=True)
    config = {"model": {"model_id": "prism", "vision_backbone_id": "dinosiglip-vit-so-56px", "llm_backbone_id": "vicuna-v15-7b",
                        "arch_specifier": "no-align+fused-gelu-mlp", "image_resize_strategy": "resize-naive", "llm_max_length": 2048}}
    (folder / "config.json").write_text(json.dumps(config))
    state = {"projector": {f"projector.{k}": t for k, t in fused.state_dict().items()}, "llm_backbone": {f"llm.{k}": t for k, t in llama.state_dict().items()}}
    torch.save({"model": state}, folder / "checkpoints/latest-checkpoint.pt")
    with pytest.raises(UserError, match="dinosiglip-vit-so-56px.*--vision DIR,DIR"):
        VLM.from_pretrained(folder)
    vlm = VLM.from_pretrained(folder, vision=f"{tmp_path / 'dino'},{tmp_path / 'siglip'}")
    assert (vlm.cfg.image_token, vlm.cfg.pad_token, vlm.cfg.template, vlm.cfg.image_mode) == (32001, 32000, "prism_vicuna", "resize")

    raw = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    norm = lambda mean, std: (raw / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    features = torch.cat([dino(norm(IMAGENET_MEAN, IMAGENET_STD), output_hidden_states=True).hidden_states[-2][:, 5:],
                          siglip(norm((0.5,) * 3, (0.5,) * 3), output_hidden_states=True).hidden_states[-2]], dim=2)
    tokens = torch.tensor([[1] + [32001] * 16 + [450, 451]] * 2)
    x = llama.model.embed_tokens(tokens)
    x[:, 1:17] = fused(features)
    close(vlm(tokens, raw), llama(inputs_embeds=x).logits)

    if LLAMA.exists():                                                      # the tokenizer beside it keeps Prismatic's ids of <PAD> and picture
        (folder / "tokenizer.model").write_bytes(LLAMA.read_bytes())
        assert run(lambda: tools_weights.main(["convert", str(folder), str(tmp_path / "out"), "--vision", f"{tmp_path / 'dino'},{tmp_path / 'siglip'}"])) == 0
        tok = Tokenizer(tmp_path / "out")
        assert (tok.image, tok.pad) == (Tokenizer(folder).image, Tokenizer(folder).pad) == (32001, 32000)
    vlm.save_pretrained(tmp_path / "ours")                                  # no public layout of ours holds two towers
    again = VLM.from_pretrained(tmp_path / "ours")
    assert again.cfg == vlm.cfg and same(again, vlm)
    state["vision_backbone"] = ({f"dino_featurizer.{k}": t for k, t in timm_names(vlm.vision, True).items()}
                                | {f"siglip_featurizer.{k}": t for k, t in timm_names(vlm.vision2).items()})
    torch.save({"model": state}, folder / "checkpoints/latest-checkpoint.pt")              # a full finetune holds the towers, as timm names them
    close(VLM.from_pretrained(folder)(tokens, raw), vlm(tokens, raw))
    fc = {"0": "fc1", "2": "fc2", "4": "fc3"}                               # and the layout in which OpenVLA wrote the same
    names = ({f"projector.{fc[k[0]]}{k[1:]}": t for k, t in fused.state_dict().items()} | {f"language_model.{k}": t for k, t in llama.state_dict().items()}
             | {f"vision_backbone.featurizer.{k.replace('gamma', 'scale_factor')}": t for k, t in timm_names(vlm.vision, True).items()}
             | {f"vision_backbone.fused_featurizer.{k}": t for k, t in timm_names(vlm.vision2).items()})
    close(VLM.from_pretrained(write(tmp_path / "hf", {"model_type": "prismatic", **config["model"]}, names))(tokens, raw), vlm(tokens, raw))


# ---- InternVL -------------------------------------------------------------------------------------------------------

INTERN_NAMES = [("vision_tower.", "vision_model."), ("encoder.layer.", "encoder.layers."), ("embeddings.cls_token", "embeddings.class_embedding"),
                ("embeddings.position_embeddings", "embeddings.position_embedding"), ("patch_embeddings.projection", "patch_embedding"),
                ("lambda_1", "ls1"), ("lambda_2", "ls2"), ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
                ("attention.projection_layer", "attn.proj"), ("attention.q_norm", "attn.q_norm"), ("attention.k_norm", "attn.k_norm"),
                ("multi_modal_projector.layer_norm", "mlp1.0"), ("multi_modal_projector.linear_1", "mlp1.1"), ("multi_modal_projector.linear_2", "mlp1.3")]


def intern_names(state, cfg):
    """transformers' port of InternVL -> the directories of OpenGVLab."""
    out, llm = {}, {}
    for name, t in state.items():
        name = name.removeprefix("model.")
        if name.startswith("language_model.") or name.startswith("lm_head"):
            llm[name if name.startswith("lm_head") else "model." + name.removeprefix("language_model.")] = t
            continue
        for a, b in INTERN_NAMES:
            name = name.replace(a, b)
        if ".attention.q_proj." in name:
            t = torch.cat([state[k] for k in state if k.endswith(("q_proj." + name.split(".")[-1], "k_proj." + name.split(".")[-1], "v_proj." + name.split(".")[-1]))
                           and f"vision_tower.encoder.layer.{name.split('.')[3]}." in k])
            name = name.replace("attention.q_proj", "attn.qkv")
        if "k_proj" not in name and "v_proj" not in name:
            out[name] = t
    return out | {"language_model." + k: v for k, v in internlm2(llm, cfg).items()}


@torch.no_grad()
@pytest.mark.parametrize("big", [False, True])
def test_internvl_equals_transformers_port_renamed(tmp_path, big):
    tr = transformers
    tower = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=[56, 56], patch_size=[14, 14],
                 attention_bias=not big, norm_type="rms_norm" if big else "layer_norm", use_qk_norm=big, layer_norm_eps=1e-6)
    text = llama_json(replace(TINY.decoder, block_size=2048))
    theirs = lively(tr.InternVLForConditionalGeneration(tr.InternVLConfig(vision_config=tower, text_config=text, image_token_id=89, image_seq_length=4,
                                                                          tie_word_embeddings=False)))
    config = {"model_type": "internvl_chat", "downsample_ratio": 0.5, "ps_version": "v2", "force_image_size": 56, "select_layer": -1, "template": "internvl2_5",
              "llm_config": LM2, "vision_config": {"model_type": "intern_vit_6b", **tower, "image_size": 56, "patch_size": 14, "hidden_act": "gelu",
                                                   "qkv_bias": not big, "qk_normalization": big}}
    vlm = VLM.from_pretrained(write(tmp_path / "m", config, intern_names(theirs.state_dict(), TINY.decoder)))
    assert (vlm.cfg.image_token, vlm.cfg.pad_token, vlm.cfg.template, vlm.cfg.vision.n_token) == (89, 2, "internvl2_5", 4)
    tokens = torch.tensor([[1, 5] + [89] * 4 + [7, 8]] * 2)
    close(vlm(tokens, PIXELS), theirs(input_ids=tokens, pixel_values=PIXELS).logits)
    vlm.save_pretrained(tmp_path / "ours")
    assert same(VLM.from_pretrained(tmp_path / "ours"), vlm)


# ---- convert and info -----------------------------------------------------------------------------------------------

@torch.no_grad()
def test_convert_gives_transformers_the_original_layout_with_rows_for_the_image_token(tmp_path):
    vlm = lively(VLM(replace(TINY, decoder=replace(TINY.decoder, vocab_size=32000), image_token=32000, pad_token=32001)))
    original(tmp_path / "m", vlm, tower=True)
    assert run(lambda: tools_weights.main(["convert", str(tmp_path / "m"), str(tmp_path / "hf")])) == 0
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.tensor([[1] + [32000] * 16 + [5, 6]])
    close(vlm(tokens, PIXELS[:1]), theirs(input_ids=tokens, pixel_values=PIXELS[:1]).logits[..., :32000])
    assert theirs.lm_head.weight.shape[0] == 32064
    assert run(lambda: tools_weights.main(["convert", str(tmp_path / "m"), str(tmp_path / "m")])) == 1


def test_convert_of_a_language_model_alone_keeps_its_names(tmp_path):
    tensors = {"model.norm.weight": torch.ones(4), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    folder = write(tmp_path / "m", {"model_type": "llama"}, tensors, "pytorch_model.bin")
    (folder / "tokenizer.model").write_text("x")
    assert run(lambda: tools_weights.main(["convert", str(folder), str(tmp_path / "out")])) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert load_file(tmp_path / "out/model.safetensors").keys() == {"model.norm.weight"}


def test_info_says_what_a_model_is_made_of(tmp_path, capsys):
    assert run(lambda: tools_weights.main(["info", "llava-1.5-7b"])) == 0
    said = capsys.readouterr().out
    assert all(f"{n:,} parameters" in said for n in (303_507_456, 20_979_712, 6_738_415_616 + 2 * 64 * 4096)) and "576 visual tokens" in said
    for folder in original(tmp_path / "m", narrow(), tower=True), write(tmp_path / "clip", clip_json(TINY.vision), {"x": torch.ones(1)}):
        assert run(lambda: tools_weights.main(["info", str(folder)])) == 0
    assert run(lambda: tools_weights.main(["info", str(tmp_path / "none")])) == 1
    assert "neither a directory nor a preset" in capsys.readouterr().err


# ---- true sizes -----------------------------------------------------------------------------------------------------

def test_true_sizes_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        so400m = VisionConfig(384, 14, 1152, 27, 16, 4304, "gelu", 1e-6, False, 0, False, True)
        dino = VisionConfig(384, 14, 1024, 24, 16, 4096, "gelu", 1e-6, True, 4, False, True, True)
        intern = VisionConfig(448, 14, 1024, 24, 16, 4096, "gelu", 1e-6, True, 0, False, True, True, False, merge=2)
        big = replace(intern, n_embd=3200, n_layer=45, n_head=25, n_hidden=12800, rms_norm=True)
        head = 4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 4 * 1152                # its pooling head, which is not built here
        assert size(ViT(so400m)) + head == pytest.approx(428.2e6, abs=5e4)
        assert size(ViT(intern)) == 304_012_288 and size(ViT(big)) == 5_536_496_000
        assert size(ViT(replace(dino, image_size=224))) == pytest.approx(303.2e6, rel=3e-4)
        assert (so400m.n_token, dino.n_token, intern.n_token) == (729, 729, 256)
        for n_embd, millions in (4096, 71.4), (5120, 89.7):
            cfg = VLMConfig(dino, DecoderConfig(n_embd=n_embd), "fused_gelu", vision2=so400m)
            assert cfg.n_feature == 2176 and size(Connector(cfg)) == pytest.approx(millions * 1e6, abs=5e4)
        lm = DecoderConfig(92553, 24, 16, 8, 2048, 128, 8192)
        for vision, decoder, connector, total in ((intern, lm, 12_595_200, 2_205_754_368),
                                                  (intern, DecoderConfig(92553, 32, 32, 8, 4096, 128, 14336), 33_570_816, 8_075_365_376),
                                                  (big, DecoderConfig(92553, 48, 48, 8, 6144, 128, 16384), 116_429_824, 25_514_186_112)):
            cfg = VLMConfig(vision, decoder, "norm_gelu", 92546, 2)
            assert size(Connector(cfg)) == connector and size(VLM(cfg)) == total


# ---- damaged --------------------------------------------------------------------------------------------------------

def spoil_index(folder):
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "pytorch_model.bin", "model.ghost": "pytorch_model.bin"}}))


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


DAMAGES = {
    "cut": (lambda d: os.truncate(d / "pytorch_model.bin", 5000), "pytorch_model.bin: truncated or damaged"),
    "empty": (lambda d: (d / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin: truncated or damaged"),
    "code": (lambda d: torch.save({"x": Evil()}, d / "pytorch_model.bin"), "pytorch_model.bin: .*more than tensors"),
    "ghost": (spoil_index, "names model.ghost, but pytorch_model.bin does not hold it"),
    "none": (lambda d: (d / "pytorch_model.bin").unlink(), "model.safetensors: not found, nor pytorch_model.bin"),
    "start-end tokens": (lambda d: original(d, narrow(), True, mm_use_im_start_end=True), "mm_use_im_start_end is True; only False"),
    "a tower alone": (lambda d: write(d, clip_json(TINY.vision), {}), "model_type is 'clip_vision_model'; only 'llava'"),
    "tiles": (lambda d: original(d, narrow(), True, image_aspect_ratio="anyres_max_9"), "'anyres_max_9' is unknown"),
    "biases": (lambda d: original(d, narrow(), True, attention_bias=True), "attention_bias is True"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_one_clear_error(tmp_path, damage):
    folder = original(tmp_path / "m", narrow(), tower=True)
    VLM.from_pretrained(folder)
    spoil, says = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(UserError, match=f"{folder}.*{says}"):
        VLM.from_pretrained(folder)


def test_a_tokenizer_of_another_model_is_one_clear_error():
    tok = SimpleNamespace(path="t", n_text=320, image=32000)
    check_tokenizer(narrow(), tok)
    for wrong in dict(n_text=321), dict(image=320):
        with pytest.raises(UserError, match="t: has .* pieces .* of different models"):
            check_tokenizer(narrow(), SimpleNamespace(**vars(tok) | wrong))


@torch.no_grad()
def test_a_preset_is_built_from_two_towers_of_other_families_trains_and_is_saved(tmp_path):
    for kind in "registers", "siglip vision":
        lively(clip_and_siglip()[kind]).save_pretrained(tmp_path / kind.split()[0])
    cfg = train.TrainConfig(model="toy", vision=f"{tmp_path / 'registers'},{tmp_path / 'siglip'}", llm=train.TOY["llm"], image_size=84, stage="pretrain")
    vlm, tok = train.build(cfg)
    assert (vlm.cfg.vision.n_token, vlm.cfg.n_feature, vlm.cfg.connector) == (36, 128, "fused_gelu")        # 6 x 6 patches, tables resized from 4 x 4
    train.freeze(vlm, replace(cfg, train="connector,vision"))
    assert {n.split(".")[0] for n, p in vlm.named_parameters() if p.requires_grad} == {
        "connector", "vision", "vision2"}
    support_checkpoint.save_model(tmp_path / "m", vlm, tok)
    again, same_tok = train.build(train.TrainConfig(model=str(tmp_path / "m")))
    assert again.cfg == vlm.cfg and same(again, vlm) and same_tok.image == tok.image
