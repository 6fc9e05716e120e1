"""Ten exercises for a reader. Each test fails as the code stands, and passes when its exercise is solved.

    python -m pytest tests/exercises.py -k connector
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from common import TOWER, tiny_config
from PIL import Image
from torch.testing import assert_close

import conversation
import model
import mpo
import support.tiling
import train
import vision


def test_connector(tok):
    """model.py: give CONNECTORS a third size, "mlp3x_gelu": three linear layers, a GELU between each two."""
    connector = model.VLM(tiny_config(tok, connector="mlp3x_gelu")).connector
    features = torch.randn(1, 16, 32)
    x = F.gelu(connector.layers[2](F.gelu(connector.layers[0](features[0]))))
    assert_close(connector(features), connector.layers[4](x))


def test_resize():
    """vision.py: a square mode "corner": scale the long side to S, the picture at the top left of black."""
    image = Image.effect_noise((80, 40), 50).convert("RGB")
    tile = vision.make_square(image, TOWER, "corner")
    expected = Image.new("RGB", (32, 32))
    expected.paste(image.resize((32, 16), Image.BICUBIC), (0, 0))
    assert tile.tobytes() == expected.tobytes()
    assert "corner" in vision.MODES


def test_global_view():
    """support/tiling.py: LLaVA-1.5-HD without its global view is a flag; make it what mode hd does."""
    tiles, _ = vision.cut_tiles(Image.new("RGB", (64, 64)), TOWER, "hd")
    assert len(tiles) == 4
    assert support.tiling.TILINGS["hd"].global_view == "none"


def test_layer(tok):
    """vision.py: LLaVA reads hidden state -2. Read the mean of the last two hidden states instead."""
    torch.manual_seed(0)
    tower = vision.ViT(TOWER)
    pixels = torch.randn(1, 3, 32, 32)
    x = tower.embed(pixels)
    hidden = []
    for block in tower.blocks:
        x = block(x)
        hidden.append(x[:, 1:])
    assert_close(tower(pixels), (hidden[0] + hidden[1]) / 2)


def test_window(tok):
    """model.py: give DecoderConfig a `window` (0: none), the most tokens that one attends to (Mistral)."""
    torch.manual_seed(0)
    plan = tiny_config(tok)
    vlm = model.VLM(replace(plan, decoder=replace(plan.decoder, n_layer=1, window=4)))
    tokens = torch.randint(3, 100, (1, 12))
    other = tokens.clone()
    other[0, 0] = 200
    logits, logits_other = vlm(tokens), vlm(other)
    assert not torch.allclose(logits[0, 3], logits_other[0, 3])
    assert_close(logits[0, 4:], logits_other[0, 4:])


def test_sampling():
    """model.py: `min_p` of Sampling drops tokens less likely than min_p times the likeliest one."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    sampling = model.Sampling(temperature=1.0, min_p=0.4)
    drawn = {int(model.pick_token(logits, sampling)) for _ in range(200)}
    assert drawn == {0, 1}


def test_template(tok):
    """conversation.py: a template "plain_chat", "<s>Q: {}\\nA: {}</s>", each later turn as the first."""
    turns = [("human", "Hello"), ("gpt", "Hi"), ("human", "Who?"), ("gpt", "Me")]
    tokens, labels = conversation.encode_conversation(tok, turns, "plain_chat", [])
    assert tok.decode(tokens) == "Q: Hello\nA: HiQ: Who?\nA: Me"
    supervised = [i for i in labels if i != model.IGNORE]
    assert tok.decode(supervised) == "Hi Me"
    assert supervised.count(tok.eos) == 2


def test_schedule():
    """train.py: after the warmup the rate falls in a line, to 0 after the last step."""
    rates = [train.lr_at(step, 11, 1.0, 1 / 11) for step in range(1, 12)]
    assert rates[0] == 0
    assert rates[1:] == [1 - i / 10 for i in range(10)]


def test_smoothing():
    """mpo.py: dpo_loss with label smoothing e, as cDPO has it: (1 - e) L_p(r_c, r_r) + e L_p(r_r, r_c)."""
    r_c, r_r = torch.tensor([1.0]), torch.tensor([0.0])
    expected = -0.9 * F.logsigmoid(r_c - r_r) - 0.1 * F.logsigmoid(r_r - r_c)
    assert_close(mpo.dpo_loss(r_c, r_r, smoothing=0.1), expected.mean())


def test_delta():
    """mpo.py: delta as a moving mean, 0.9 of the old and 0.1 of the new, and not as the mean of all."""
    delta, _ = mpo.update_delta(0.5, 100, torch.tensor([[1.0, 2.0]]))
    assert math.isclose(delta, 0.9 * 0.5 + 0.1 * 1.5)

