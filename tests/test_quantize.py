"""Weights of 8 bits, and 16-bit products on a CPU without instructions for them."""

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

from model import VLM
from sample import open_asked
from support.cli import UserError
from support.flags import ModelConfig
from support.quantize import Int8Linear, WideLinear, join_products, to_int8, use_int8


def test_eight_bits_are_within_half_a_step_of_the_weight():
    torch.manual_seed(0)
    W = torch.randn(64, 96) * torch.logspace(-3, 3, 64)[:, None]
    Q, scale = to_int8(W)
    assert Q.abs().amax() == 127
    off = (Q * scale.float()[:, None] - W).abs() / scale.float()[:, None]
    assert off.amax() < 0.5 + 127 / 2**8  # the scale itself has the 8 bits of bfloat16


@pytest.mark.parametrize("shape", [(1, 1, 96), (5, 1, 96), (2, 7, 96), (3, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_layer_gives_the_product_with_its_weights_for_a_step_a_prompt_and_wanted_rows(shape, dtype):
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(96, 64, bias=False).weight.detach())
    x = torch.randn(shape)
    exact = x.double() @ (layer.weight.double() * layer.scale.double()[:, None]).T
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert_close(y.double(), exact, rtol=0.02, atol=0.02)


def test_rows_of_a_step_do_not_depend_on_how_many_there_are():
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(96, 64, bias=False))
    with torch.no_grad():
        use_int8(holder, "cpu")
    x = torch.randn(16, 1, 96)
    assert torch.equal(holder(x)[3:4], holder(x[3:4]))


@pytest.mark.parametrize("has_instructions", [True, False])
def test_sixteen_bit_layers_give_what_they_gave_and_in_float32_where_that_is_faster(
    monkeypatch, has_instructions
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_instructions)
    torch.manual_seed(0)
    linear = nn.Linear(96, 64).bfloat16()
    x = torch.randn(2, 7, 96).bfloat16()
    usual = linear(x)
    linear.__class__ = WideLinear
    assert_close(linear(x), usual, rtol=0.02, atol=0.02)


def test_a_model_opens_in_eight_bits_and_its_batches_answer_as_single_questions_do(tiny, tok):
    vlm, _ = open_asked(ModelConfig(model=str(tiny), quantize="int8"))
    kinds = {type(layer) for layer in vlm.decoder.layers.modules() if hasattr(layer, "weight")}
    assert Int8Linear in kinds and nn.Linear not in kinds
    tokens = torch.randint(3, 300, (4, 9))
    together = vlm.generate(tokens, max_new_tokens=6)
    assert torch.equal(together[1:2], vlm.generate(tokens[1:2], max_new_tokens=6))
    whole = VLM.from_pretrained(tiny)(tokens)
    assert (vlm(tokens) - whole).norm() < 0.03 * whole.norm()


def test_a_lora_is_merged_before_it_is_quantised(tiny, tmp_path, go):
    go("--lora-r", 2, out="lora")
    with pytest.raises(UserError, match="merge the LoRA"):
        open_asked(ModelConfig(model=str(tmp_path / "lora"), quantize="int8"))


def test_joined_weights_are_the_same_numbers_and_names_and_so_are_what_they_give(tiny):
    vlm = VLM.from_pretrained(tiny)
    tokens = torch.randint(3, 300, (2, 9))
    expected = vlm(tokens)
    before = {name: p.clone() for name, p in vlm.state_dict().items()}
    join_products(vlm)
    attn = vlm.decoder.layers[0].self_attn
    assert attn.joint.stride() == (1, len(attn.joint))
    assert attn.v_proj.weight.untyped_storage().data_ptr() == attn.joint.untyped_storage().data_ptr()
    assert all(torch.equal(p, before[name]) for name, p in vlm.state_dict().items())
    assert_close(vlm(tokens), expected)
