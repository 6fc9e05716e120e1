"""Tiny models in every public layout: by the reference libraries or in their words, random numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch.testing import assert_close

from model import VLM, DecoderConfig, VLMConfig
from support.export import TO_CLIP, clip_json, llama_json
from support.weights import rename
from vision import VisionConfig

tr = pytest.importorskip("transformers")
LLAMA = Path(__file__).parents[2] / "shared" / "tokenizers" / "llama2.model"
TINY = VLMConfig(
    VisionConfig(56, 14, n_embd=64, n_layer=3, n_head=1, n_hidden=128),
    DecoderConfig(vocab_size=96, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, n_hidden=48),
    image_token=80,
    pad_token=81,
)
PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def close(a, b):
    assert_close(a, b, rtol=1e-4, atol=1e-4)


def lively(module, std=0.15):
    """Every parameter random, also those that libraries begin with at one or zero."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.eval()


def count(module):
    return sum(p.numel() for p in module.parameters())


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def parts(vlm, part):
    state = vlm.state_dict()
    return {name.removeprefix(part + "."): t for name, t in state.items() if name.startswith(part + ".")}


def write(folder, config, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder


def write_shards(folder, tensors):
    """As Vicuna lies on the hub."""
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        write(folder, None, {name: t for name, t in tensors.items() if files[name] == file}, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


# ---- towers ------------------------------------------------------------------------------------------------

SIZE = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=1, intermediate_size=128)
SIZE |= dict(image_size=56, patch_size=14)
DINO = {k: v for k, v in SIZE.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=9)
TOWERS = {
    "clip": lambda: tr.CLIPModel(tr.CLIPConfig(vision_config=SIZE, text_config=TEXT)),
    "clip vision": lambda: tr.CLIPVisionModel(tr.CLIPVisionConfig(**SIZE)),
    "siglip": lambda: tr.SiglipModel(tr.SiglipConfig(vision_config=SIZE, text_config=TEXT)),
    "siglip vision": lambda: tr.SiglipVisionModel(tr.SiglipVisionConfig(**SIZE)),
    "dinov2": lambda: tr.Dinov2Model(tr.Dinov2Config(**DINO)),
    "registers": lambda: tr.Dinov2WithRegistersModel(tr.Dinov2WithRegistersConfig(**DINO)),
    "vit": lambda: tr.ViTModel(tr.ViTConfig(**SIZE)),
    "vit classes": lambda: tr.ViTForImageClassification(tr.ViTConfig(**SIZE)),
}


def features_of(theirs, pixels=PIXELS):
    """What LLaVA reads of a tower of transformers: hidden state -2 without class token and registers."""
    tower = getattr(theirs, "vision_model", getattr(theirs, "vit", theirs))
    kind = tower.config.model_type
    prefix = 1
    if "siglip" in kind:
        prefix = 0
    elif "registers" in kind:
        prefix = 5
    return tower(pixels, output_hidden_states=True).hidden_states[-2][:, prefix:]


def clip_folder(folder, vlm):
    """The tower of a VLM as a CLIP in transformers' words."""
    tensors = {"vision_model." + rename(name, TO_CLIP): t for name, t in parts(vlm, "vision").items()}
    return write(folder, clip_json(vlm.cfg.vision), tensors)


TO_TIMM = [
    ("patch.", "patch_embed.proj."),
    ("pre_norm.", "norm_pre."),
    (".attn.out_proj.", ".attn.proj."),
    (".scale1", ".ls1.gamma"),
    (".scale2", ".ls2.gamma"),
    ("registers", "reg_token"),
    ("class_token", "cls_token"),
    (".q_proj.", ".qkv."),
]


def timm_names(vit, folded=False):
    """Our tower in timm's layout: q, k and v fused; folded: with the class token's position in it."""
    state = vit.state_dict()
    out = {}
    for own, t in state.items():
        name = own
        for ours, theirs in TO_TIMM:
            name = name.replace(ours, theirs)
        if ".q_proj." in own:
            t = torch.cat([state[own.replace("q_proj", one)] for one in ("q_proj", "k_proj", "v_proj")])
        if ".k_proj." not in own and ".v_proj." not in own:
            out[name] = t
    out["pos_embed"] = out.pop("pos")[None]
    if "reg_token" in out:
        out["reg_token"] = out["reg_token"][None]
    if "cls_token" in out:
        out["cls_token"] = out["cls_token"][None, None]
    if folded:
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


# ---- decoders ----------------------------------------------------------------------------------------------

LM2 = dict(model_type="internlm2", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
LM2 |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-5)
LM2 |= dict(bias=False, rope_theta=10000, rope_scaling={"type": "dynamic", "factor": 2.0})
TO_INTERNLM2 = [
    ("embed_tokens", "tok_embeddings"),
    ("lm_head", "output"),
    ("self_attn.o_proj", "attention.wo"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attention.wqkv"),
]


def internlm2(state, cfg):
    """A Llama's tensors in InternLM2's words, by key-value head: its queries, its key, its value."""
    out = {}
    group = cfg.n_head // cfg.n_kv_head
    for own, t in state.items():
        name = own
        for ours, theirs in TO_INTERNLM2:
            name = name.replace(ours, theirs)
        if "q_proj" in own:
            three = [state[own.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            q, k, v = (weight.split(cfg.head_dim) for weight in three)
            heads = []
            for i in range(cfg.n_kv_head):
                heads += [*q[group * i : group * i + group], k[i], v[i]]
            t = torch.cat(heads)
        if "k_proj" not in own and "v_proj" not in own:
            out[name] = t
    return out


# ---- the original LLaVA ------------------------------------------------------------------------------------


def narrow(connector="mlp2x_gelu"):
    """A LLaVA whose <image> lies beyond its table of words, as in the original."""
    decoder = replace(TINY.decoder, vocab_size=320)
    cfg = replace(TINY, connector=connector, decoder=decoder, image_token=32000, pad_token=32001)
    return lively(VLM(cfg))


def projector(vlm, prefix="model.mm_projector."):
    """One layer has no number; of several the GELUs between them are counted, too."""
    names = {name: name.removeprefix("layers.") for name in parts(vlm, "connector")}
    if vlm.cfg.connector == "linear":
        names = {name: name.removeprefix("layers.0.") for name in names}
    return {prefix + names[name]: t for name, t in parts(vlm, "connector").items()}


def original(folder, vlm, tower=False, **config):
    """liuhaotian's layout: a .bin with inv_freq, a finetuned tower inside or none."""
    names = {n if n.startswith("lm_head") else "model." + n: t for n, t in parts(vlm, "decoder").items()}
    names |= projector(vlm) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    if tower:
        start = "model.vision_tower.vision_tower.vision_model."
        names |= {start + rename(n, TO_CLIP): t for n, t in parts(vlm, "vision").items()}
    fields = {
        "model_type": "llava",
        "mm_hidden_size": 64,
        "mm_vision_tower": "openai/clip",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
    }
    if vlm.cfg.connector != "linear":
        fields["mm_projector_type"] = vlm.cfg.connector
    return write(folder, llama_json(vlm.cfg.decoder) | fields | config, names, "pytorch_model.bin")


def original_lora(folder, base, vlm, file="adapter_model.bin", layer=0, projection="o_proj"):
    """A LoRA as LLaVA's own code writes it, the connector of vlm beside it -> folder, A, B. Scale 2."""
    A, B = torch.randn(2, 32), torch.randn(32, 2)
    start = f"base_model.model.model.layers.{layer}.self_attn.{projection}."
    config = json.loads((base / "config.json").read_text())
    write(folder, config, {start + "lora_A.weight": A, start + "lora_B.weight": B}, file)
    write(folder, None, projector(vlm, "base_model.model.model.mm_projector."), "non_lora_trainables.bin")
    adapter = {"r": 2, "lora_alpha": 4, "bias": "none", "base_model_name_or_path": "lmsys/vicuna"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder, A, B


# ---- Prismatic and InternVL --------------------------------------------------------------------------------

PRISM = {
    "model_id": "p",
    "vision_backbone_id": "clip-vit-l-56px",
    "llm_backbone_id": "llama2-7b-pure",
    "arch_specifier": "no-align+gelu-mlp",
    "image_resize_strategy": "letterbox",
}


def write_prismatic(folder, config, state):
    """Prismatic's native layout: dicts in dicts in one .pt."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model": config}))
    torch.save({"model": state}, folder / "checkpoints/latest-checkpoint.pt")
    return folder


def prismatic(folder):
    """A LLaVA-like model of one CLIP tower inside the checkpoint."""
    wide = DecoderConfig(32064, n_layer=1, n_head=1, n_kv_head=1, n_embd=128, head_dim=128, n_hidden=32)
    vlm = lively(VLM(replace(TINY, decoder=wide, image_token=32001, pad_token=32000)))
    decoder = {n if n.startswith("lm_head") else "model." + n: t for n, t in parts(vlm, "decoder").items()}
    state = {
        "projector": projector(vlm, "projector."),
        "vision_backbone": {"featurizer." + name: t for name, t in timm_names(vlm.vision).items()},
        "llm_backbone": {"llm." + name: t for name, t in decoder.items()},
    }
    return write_prismatic(folder, PRISM, state)


TO_INTERN = [
    ("vision_tower.", "vision_model."),
    ("encoder.layer.", "encoder.layers."),
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("patch_embeddings.projection", "patch_embedding"),
    ("lambda_1", "ls1"),
    ("lambda_2", "ls2"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.projection_layer", "attn.proj"),
    ("attention.q_norm", "attn.q_norm"),
    ("attention.k_norm", "attn.k_norm"),
    ("attention.q_proj", "attn.qkv"),
    ("multi_modal_projector.layer_norm", "mlp1.0"),
    ("multi_modal_projector.linear_1", "mlp1.1"),
    ("multi_modal_projector.linear_2", "mlp1.3"),
]


def intern_names(state, cfg):
    """transformers' port of InternVL -> the directories of OpenGVLab."""
    out, llm = {}, {}
    for own, t in state.items():
        name = own.removeprefix("model.")
        if name.startswith("language_model."):
            llm["model." + name.removeprefix("language_model.")] = t
            continue
        if name.startswith("lm_head"):
            llm[name] = t
            continue
        if ".attention.q_proj." in own:
            t = torch.cat([state[own.replace("q_proj", one)] for one in ("q_proj", "k_proj", "v_proj")])
        for ours, theirs in TO_INTERN:
            name = name.replace(ours, theirs)
        if "k_proj" not in own and "v_proj" not in own:
            out[name] = t
    return out | {"language_model." + name: t for name, t in internlm2(llm, cfg).items()}


def internvl(folder, big=False, V=96):
    """-> folder, and transformers' model with the same weights. big: as the tower of 6B parameters."""
    tower = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
    tower |= dict(norm_type="rms_norm" if big else "layer_norm", layer_norm_eps=1e-6)
    port = dict(image_size=[56, 56], patch_size=[14, 14], attention_bias=not big, use_qk_norm=big)
    own = dict(image_size=56, patch_size=14, qkv_bias=not big, qk_normalization=big)
    text = llama_json(replace(TINY.decoder, block_size=2048, vocab_size=V))
    config = tr.InternVLConfig(
        vision_config=tower | port,
        text_config=text,
        image_token_id=V - 7,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    theirs = lively(tr.InternVLForConditionalGeneration(config))
    published = {
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "llm_config": LM2 | {"vocab_size": V},
        "vision_config": {"model_type": "intern_vit_6b", "hidden_act": "gelu", **tower, **own},
    }
    return write(folder, published, intern_names(theirs.state_dict(), TINY.decoder)), theirs
