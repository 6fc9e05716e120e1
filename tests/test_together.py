"""What is promised of tiles, of LoRA and of preferences, where they meet."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import QUICK, TOWER, call, losses, save, tiny_config
from PIL import Image
from torch.testing import assert_close

import mpo
import sample
import support.cli as support_cli
import toyworld
import train
from model import VLM
from support.data_files import Records
from support.flags import ModelConfig
from support.picture_files import open_image
from support.start import init_weights
from vision import cut_tiles


@pytest.fixture(params=["hd", "internvl"])
def mode(request):
    return request.param


@pytest.fixture
def start(tok, large_world, tmp_path, monkeypatch):
    """A tiny model of one tile of 28 px, saved in start/ beside a world of larger pictures."""
    torch.manual_seed(0)
    tower = replace(TOWER, image_size=28, patch_size=7)
    vlm = VLM(tiny_config(tok, block_size=1024, vision=tower))
    init_weights(vlm.vision), init_weights(vlm.decoder)
    (tmp_path / "world").symlink_to(large_world)
    save(vlm, tok, tmp_path / "start")
    monkeypatch.chdir(tmp_path)


def go(mode, *flags, out, model="start"):
    base = ["--model", model, "--data", "world/train.json", "--image-mode", mode, "--out", out, *QUICK]
    return call(train.main, *base, *flags)


def weights(out):
    return VLM.from_pretrained(out).state_dict()


def test_a_lora_learned_on_tiles_opens_with_its_row_end_and_resumes(start, tok):
    flags = ["--lora-r", 4, "--micro-batch-size", 2]
    assert (
        go("hd", *flags, out="whole") == 0
        and go("hd", *flags, "--max-steps", 2, "--warmup", 1, out="other") == 0
    )
    vlm, base = VLM.from_pretrained("whole"), VLM.from_pretrained("whole/base")
    assert vlm.cfg.image_mode == "hd" and not torch.equal(vlm.connector.row_end, base.connector.row_end)
    picture = cut_tiles(Image.open("world/images/train_00000.png").convert("RGB"), vlm.cfg.vision, "hd")
    tokens = torch.tensor([[tok.bos] + [tok.image] * len(picture[1]) + [5, 6]])
    assert vlm(tokens, picture[0], layout=picture[1]).isfinite().all()
    assert go("hd", *flags, "--resume", out="whole") == 0


def test_a_dry_run_counts_the_tiles(start, capfd):
    assert go("pad", "--dry-run", out="x") == 0
    one = capfd.readouterr().out
    assert go("hd", "--dry-run", out="x") == 0
    several = capfd.readouterr().out
    tokens = lambda said: float(said.split("of them ")[1].split(" tokens each")[0])
    assert "1.00 pictures in 1.00 tiles" in one and "1.00 pictures in 10" not in several
    vlm = VLM.from_pretrained("start")
    n = len(cut_tiles(Image.open("world/images/train_00000.png").convert("RGB"), vlm.cfg.vision, "hd")[1])
    assert abs(tokens(several) - tokens(one) - (n - 16)) <= 1  # all pictures of the world are alike in size


def test_questions_about_one_picture_of_tiles_share_its_look(start, mode):
    assert go(mode, out="tiled") == 0
    vlm, tok = sample.open_asked(ModelConfig("tiled", device="cpu"))
    paths = sorted(Path("world/images").glob("train*"))[:2]
    looks = [sample.cut_picture(vlm, open_image(path)) for path in paths]
    asked = [(f"Is there a {kind}?", [looks[k % 2]]) for k, kind in enumerate(toyworld.KINDS[:6])]
    prompts = [sample.encode_question(vlm, tok, text, pictures) for text, pictures in asked]
    batch = sample.make_batch(vlm, tok, prompts, 6)
    assert len(batch["pixels"]) == 2 * len(looks[0][0])
    one_by_one = [sample.answer(vlm, tok, [prompt], 6)[0] for prompt in prompts]
    assert sample.answer(vlm, tok, prompts, 6) == one_by_one


def test_preferences_are_learned_about_tiles_and_two_references_agree(start, mode):
    assert go(mode, out="tiled") == 0
    images = sorted(p.name for p in Path("world/images").glob("train*"))[:4]
    Path("pairs.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "image": f"images/{name}",
                    "question": "<image>\nWhat?",
                    "chosen": f"a cat {k}",
                    "rejected": "a dog",
                }
            )
            + "\n"
            for k, name in enumerate(images)
        )
    )
    logs = {}
    for kind in ("precomputed", "lora-off"):
        flags = ["--model", "tiled", "--data", "pairs.jsonl", "--image-root", "world", "--out", kind, *QUICK]
        flags += ["--lora-r", 4, "--train", "llm", "--reference", kind]
        assert call(mpo.main, *flags) == 0
        logs[kind] = losses(kind)
    assert_close(torch.tensor(logs["precomputed"]), torch.tensor(logs["lora-off"]), rtol=1e-5, atol=1e-6)


def test_recomputed_blocks_change_no_gradient_of_a_row_of_two_answers(start, tok):
    vlm = VLM.from_pretrained("start")
    Path("pairs.jsonl").write_text(
        json.dumps({"question": "What?", "chosen": "a red cat", "rejected": "a dog and a ball"}) + "\n"
    )
    rows = mpo.PairExamples(
        Records("pairs.jsonl", "."), tok, "vicuna_v1", vlm.cfg.vision, "pad", 256
    )
    batch, grads = mpo.collate_pairs([rows[0]], tok.pad), []
    for n in (0, 2):
        vlm.decoder.recompute = n
        vlm.zero_grad()
        s, _ = mpo.pair_log_probs(vlm, batch)
        (s[:, 0] - s[:, 1]).sum().backward()
        grads.append([p.grad.clone() for p in vlm.decoder.parameters()])
    assert_close(*grads)


def test_one_process_is_asked_for_where_only_one_can_be(start, monkeypatch, capfd):
    Path("pairs.jsonl").write_text(json.dumps({"question": "What?", "chosen": "a", "rejected": "b"}) + "\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert support_cli.run_program(lambda: mpo.main(["--model", "start", "--data", "pairs.jsonl"])) == 1
    assert "without torchrun" in capfd.readouterr().err.splitlines()[-1]
