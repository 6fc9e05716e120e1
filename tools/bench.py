"""How fast, beside a peer: the same model and weights, here and in transformers, doing the same work.

    python -m tools.bench train --peer transformers      # a step of LLaVA's second stage, 10M parameters
    python -m tools.bench train --preset 100m --dtype bfloat16 --peer transformers --compile
    python -m tools.bench mpo --peer transformers        # a step of preference learning
    python -m tools.bench sample --peer transformers     # greedy decoding

Two runs on a busy machine cannot be compared. So both sides run step by step in turn in one process, each
ratio is of two neighbouring steps, and the median of the ratios counts. On a CPU time is the process's own,
on one thread: what others do on the machine is not in it. Memory is the highest a process of its own ever
held, with and without what it held before its first step.

Model FLOPs of a step of train, with n_t tokens through the decoder's blocks (P weights), n_s supervised ones
through the head and what follows the last block's attention (Q of the P weights), n_v patch rows through the
frozen tower (W weights) and n_c through the connector (C weights), attention causal:
    6 ((P - Q) n_t + (Q + V D) n_s) + 12 L D T n_t / 2 + 2 W n_v + 4 S D_v L_v n_v + 6 C n_c
The peer runs head and last block on every token; that is work nobody asked for and is not counted. MFU is
against a square matrix product in the same run.

A step of mpo: pairs with 256 visual tokens and 60 tokens an answer, and the three losses of mpo.py on both
sides. Here a pair is one row, its picture is looked at once, and what the reference says is known
(--no-precomputed: asked in every step). The peer does it the usual way: two rows a pair, the picture encoded
for each, the reference asked in every step, a log-softmax of all logits.
"""

import copy
import multiprocessing
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

import mpo
from model import IGNORE, PRESETS, VLM, DecoderConfig, VLMConfig, init_weights
from support.cli import REQUIRED, UserError, arg, parse, pick_device, run
from support.io import write_json
from support.plan import matmul_rate
from vision import VisionConfig


class Work(NamedTuple):
    """What both sides do in a step."""
    cfg: VLMConfig
    rows: int                        # records, or pairs
    n_token: int                     # of each, with its picture, and of a pair with both answers
    n_answer: int                    # supervised tokens of a record, or tokens of each of a pair's answers


SIZES = {                            # preset -> model, rows, words a row, of which supervised
    "10m": (
        VLMConfig(
            VisionConfig(image_size=112, patch_size=14, n_embd=192, n_layer=4, n_head=3, n_hidden=768),
            DecoderConfig(2048, n_layer=6, n_head=4, n_kv_head=4, n_embd=256, head_dim=64, n_hidden=704),
            image_token=2046,
            pad_token=2047,
        ),
        32, 48, 32,
    ),
    "100m": (
        VLMConfig(
            VisionConfig(image_size=168, patch_size=14, n_embd=384, n_layer=8, n_head=6, n_hidden=1536),
            DecoderConfig(32000, n_layer=10, n_head=10, n_kv_head=10, n_embd=640, head_dim=64, n_hidden=1728),
            image_token=31998,
            pad_token=31999,
        ),
        8, 112, 64,
    ),
    "llava-1.5-7b": (PRESETS["llava-1.5-7b"], 10, 240, 160),
}


@dataclass
class BenchConfig:
    program: str = arg(REQUIRED, "what a step is", choices=("train", "mpo", "sample"), positional=True)
    preset: str = arg("10m", "the model's size", choices=tuple(SIZES))
    peer: str = arg("", "LlavaForConditionalGeneration beside it; empty: none", choices=("transformers",))
    dtype: str = arg("float32", "bfloat16 is autocast, on both sides", choices=("float32", "bfloat16"))
    vocab: int = arg(0, "words in the vocabulary; 0: as the preset says", at_least=0)
    layers: int = arg(0, "decoder blocks; 0: as the preset says", at_least=0)
    rows: int = arg(0, "records or pairs in the batch; 0: as the preset says, one for sample", at_least=0)
    words: int = arg(0, "text tokens a record, of a pair before its answers; 0: as above", at_least=0)
    supervised: int = arg(0, "supervised tokens of a record, or tokens of an answer; 0: as above", at_least=0)
    new_tokens: int = arg(64, "sample: tokens to generate", at_least=1)
    precomputed: bool = arg(True, "mpo: here the reference is not asked again in every step")
    compile: bool = arg(False, "torch.compile: here the blocks, there the model")
    compile_peer: bool = arg(True, "--no-compile-peer: --compile leaves the peer as it is")
    repeats: int = arg(7, "steps of each side that count, after two that do not", at_least=1)
    memory: bool = arg(True, "measure peak memory, in processes of their own")
    threads: int = arg(1, "CPU threads; above 1 the time is the clock's", at_least=1)
    device: str = arg("cpu", "cpu, cuda or cuda:N")
    out: str = arg("bench", "name of the .json file")


def main(argv=None):
    cfg = parse(BenchConfig, argv, description=__doc__)
    torch.set_num_threads(cfg.threads)
    result = compare(cfg)
    words = sys.argv[1:] if argv is None else argv
    result["command"] = shlex.join(["python", "-m", "tools.bench", *words])
    print_result(result)
    write_json(f"{cfg.out}.json", result)
    return 0


def compare(cfg):
    """Run the sides in turn -> all that was found, with the flags."""
    device = pick_device(cfg.device)
    work = plan_work(cfg)
    models = make_models(cfg, work)
    steps = {name: make_step(name, model, cfg, work, device) for name, model in models.items()}
    clock = time.process_time if device.type == "cpu" and cfg.threads == 1 else time.perf_counter

    # The first step is compiled and warms up, the second makes nothing new: neither counts.
    seconds = {name: [] for name in steps}
    outputs = {name: [] for name in steps}
    for i in range(cfg.repeats + 2):
        for name, step in steps.items():
            wait_for(device)
            began = clock()
            output = step()
            wait_for(device)
            if i >= 2:
                seconds[name].append(clock() - began)
            outputs[name].append(output.tolist())

    result = asdict(cfg) | {
        "torch": torch.__version__,
        "parameters": n_weight(models["plainvlm"]),
        "rows": work.rows,
        "tokens": work.n_token,
        "supervised": work.n_answer,
        "vocab": work.cfg.decoder.vocab_size,
        "matmul": matmul_rate(device, getattr(torch, cfg.dtype), clock=clock),
        "flops": count_flops(work),
    }
    result["sides"] = {name: sum_up(name, times, cfg, work) for name, times in seconds.items()}
    if cfg.program == "train":
        for side in result["sides"].values():
            side["mfu"] = result["flops"] / side["seconds"] / result["matmul"]
    if cfg.peer:
        result["agreement"] = check_agreement(cfg, *outputs.values())
        ratios = [theirs / ours for ours, theirs in zip(*seconds.values())]
        result["ratio"] = statistics.median(ratios)
        result["ratio_spread"] = [min(ratios), max(ratios)]
    return result


def sum_up(name, times, cfg, work):
    n_token = tokens_computed(name, cfg, work)
    middle = statistics.median(times)
    side = {"seconds": middle, "least": min(times), "most": max(times)}
    side |= {"tokens": n_token, "tokens_per_second": n_token / middle}
    if cfg.memory and cfg.device == "cpu":
        side |= measure_memory(cfg, name)
    return side


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def check_agreement(cfg, ours, theirs):
    """-> the largest relative difference of the losses; of answers, the share of tokens that are the same."""
    if cfg.program == "sample":
        pairs = [pair for rows in zip(ours[0], theirs[0]) for pair in zip(*rows)]
        return statistics.mean(a == b for a, b in pairs)
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs))
    if worst > (1e-3 if cfg.dtype == "float32" else 3e-2):
        raise UserError(
            f"the losses differ by {worst:.1e}: {ours[:3]} here, {theirs[:3]} there; "
            "this would compare two different things"
        )
    return worst


# ---- the work ----


def plan_work(cfg):
    vlm_cfg, rows, words, n_answer = SIZES[cfg.preset]
    vision = vlm_cfg.vision
    if cfg.program == "mpo":
        vision = replace(vision, image_size=16 * vision.patch_size)
        rows, words, n_answer = 8, 32, 60
    elif cfg.program == "sample":
        rows = 1
    rows = cfg.rows or rows
    words = cfg.words or words
    n_answer = cfg.supervised or n_answer

    n_token = vision.n_token + words
    if cfg.program == "mpo":
        n_token += 2 * n_answer
    else:
        n_answer = min(n_answer, words - 1)
    V = cfg.vocab or vlm_cfg.decoder.vocab_size
    decoder = replace(
        vlm_cfg.decoder,
        vocab_size=V,
        n_layer=cfg.layers or vlm_cfg.decoder.n_layer,
        block_size=max(vlm_cfg.decoder.block_size, n_token + cfg.new_tokens),
    )
    vlm_cfg = replace(vlm_cfg, vision=vision, decoder=decoder, image_token=V - 2, pad_token=V - 1)
    return Work(vlm_cfg, rows, n_token, n_answer)


def random_batch(work, device):
    """-> tokens and labels (B, T), pixels (B, 3, S, S), normalised as the peer wants them."""
    generator = torch.Generator().manual_seed(0)
    vision = work.cfg.vision
    tokens = torch.randint(3, work.cfg.image_token, (work.rows, work.n_token), generator=generator)
    tokens[:, 1 : 1 + vision.n_token] = work.cfg.image_token
    labels = tokens.clone()
    labels[:, : -work.n_answer] = IGNORE
    pixels = torch.randn(work.rows, 3, vision.image_size, vision.image_size, generator=generator)
    return tokens.to(device), labels.to(device), pixels.to(device)


def make_models(cfg, work):
    """{name: model}, with the same weights."""
    torch.manual_seed(0)
    vlm = init_weights(VLM(work.cfg))
    if not cfg.peer:
        return {"plainvlm": vlm}
    try:
        from transformers import LlavaForConditionalGeneration
    except ImportError:
        raise UserError("--peer transformers: pip install transformers, or leave out --peer") from None
    with tempfile.TemporaryDirectory() as directory:
        vlm.save_pretrained(directory)
        peer = LlavaForConditionalGeneration.from_pretrained(
            directory, attn_implementation="sdpa", dtype=torch.float32
        )
    return {"plainvlm": vlm, "transformers": peer}


def make_step(name, model, cfg, work, device):
    """-> a function that does the work once, and returns the loss or the new ids."""
    is_ours = name == "plainvlm"
    model.to(device)
    tower = model.vision if is_ours else model.model.vision_tower
    tower.requires_grad_(False)                          # as in LLaVA's second stage
    batch = random_batch(work, device)
    if cfg.program == "sample":
        model.eval().to(getattr(torch, cfg.dtype))
        return make_decoding(model, is_ours, cfg, batch)

    call = model
    if cfg.compile and is_ours:
        for block in [*model.decoder.layers, *model.vision.blocks]:
            block.compile(dynamic=None)
    elif cfg.compile and cfg.compile_peer:
        call = torch.compile(model)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    with autocast:
        if cfg.program == "train":
            loss_of = answer_loss(call, is_ours, batch)
        elif is_ours:
            loss_of = pairs_in_a_row(model, call, batch, work, cfg)
        else:
            loss_of = pairs_in_two_rows(model, call, batch, work)

    def step():
        with autocast:
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# ---- one step of each program and side ----


def answer_loss(call, is_ours, batch):
    tokens, labels, pixels = batch
    if is_ours:
        return lambda: call(tokens, pixels, labels)
    mask = torch.ones_like(tokens)
    return lambda: call(input_ids=tokens, attention_mask=mask, pixel_values=pixels, labels=labels).loss


def pairs_in_a_row(model, call, batch, work, cfg):
    """A pair is one row, as mpo.py has it: prompt, chosen, rejected."""
    tokens, _, pixels = batch
    n = work.n_answer
    layout = torch.tensor([(0, i) for i in range(model.cfg.vision.n_token)])
    examples = []
    for i, ids in enumerate(tokens.tolist()):
        example = mpo.pair_row(ids[: -2 * n], ids[-2 * n : -n], ids[-n:])
        example |= {"pixels": pixels[i : i + 1], "layout": layout, "id": "", "index": i, "pictures_of": i}
        examples.append(example)
    pairs = mpo.to_device(mpo.collate_pairs(examples, model.cfg.pad_token), tokens.device)

    reference = None
    if cfg.precomputed:
        with torch.no_grad():
            known, _ = mpo.pair_log_probs(model, pairs)
    else:
        reference = copy.deepcopy(model).requires_grad_(False)
        reference.vision = model.vision                  # frozen: one is enough

    def loss_of():
        with torch.no_grad():
            features = model.features(pairs["pixels"])
            s_ref = mpo.pair_log_probs(reference, pairs, features)[0] if reference else known
        s, _ = mpo.pair_log_probs(call, pairs, features)
        return pair_loss(s, s_ref, n)

    return loss_of


def pairs_in_two_rows(model, call, batch, work):
    """The same pairs as 2 B rows, the chosen answers first."""
    tokens, _, pixels = batch
    n = work.n_answer
    chosen = tokens[:, :-n]
    rejected = torch.cat([tokens[:, : -2 * n], tokens[:, -n:]], dim=1)
    rows = torch.cat([chosen, rejected])                 # (2 B, T - n)
    both_pixels = torch.cat([pixels, pixels])
    mask = torch.ones_like(rows)
    reference = copy.deepcopy(model).requires_grad_(False)

    def sums(net):
        logits = net(input_ids=rows, attention_mask=mask, pixel_values=both_pixels).logits[:, :-1].float()
        log_probs = logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[:, :, 0]
        return log_probs[:, -n:].sum(1).view(2, -1).T    # (B, 2)

    def loss_of():
        with torch.no_grad():
            s_ref = sums(reference)
        return pair_loss(sums(call), s_ref, n)

    return loss_of


def pair_loss(s, s_ref, n):
    cfg = mpo.MPOConfig()
    delta, _ = mpo.update_delta(0.0, 0, cfg.beta * (s - s_ref))
    terms = mpo.mpo_terms(s, s_ref, torch.full_like(s, n), delta, cfg)
    return sum(weight * term for weight, term in terms.values())


def make_decoding(model, is_ours, cfg, batch):
    """Greedy, and past any end token: both sides make as many tokens."""
    tokens, _, pixels = batch
    n = cfg.new_tokens
    pixels = pixels.to(getattr(torch, cfg.dtype))
    if is_ours:
        return lambda: model.generate(tokens, pixels, n, stop=[model.cfg.pad_token])
    image_token = model.config.image_token_id
    options = {
        "max_new_tokens": n,
        "min_new_tokens": n,
        "do_sample": False,
        "suppress_tokens": [image_token, image_token + 1],       # as here, where nothing says them
        "pad_token_id": 0,
    }
    mask = torch.ones_like(tokens)

    def step():
        ids = model.generate(input_ids=tokens, attention_mask=mask, pixel_values=pixels, **options)
        return ids[:, tokens.shape[1] :]

    return step


# ---- what it costs ----


def n_weight(module):
    return sum(p.numel() for p in module.parameters())


def tokens_computed(name, cfg, work):
    """How many tokens a side sends through a decoder in a step."""
    if cfg.program == "train":
        return work.rows * work.n_token
    if cfg.program == "sample":
        return work.rows * cfg.new_tokens
    if name == "plainvlm":
        return work.rows * work.n_token * (1 if cfg.precomputed else 2)
    return 2 * 2 * work.rows * (work.n_token - work.n_answer)


def count_flops(work):
    """Of a step of train, as the docstring above counts them."""
    decoder, vision = work.cfg.decoder, work.cfg.vision
    with torch.device("meta"):
        vlm = VLM(work.cfg)
    n_patch = vision.grid**2 + vision.n_prefix
    n_t = work.rows * work.n_token
    n_s = work.rows * work.n_answer
    n_v = work.rows * n_patch
    n_c = work.rows * vision.n_token

    last = vlm.decoder.layers[-1]
    P = n_weight(vlm.decoder.layers)
    Q = n_weight(last.mlp) + n_weight(last.self_attn.o_proj)
    W = n_weight(vlm.vision.blocks[: vision.depth])
    C = n_weight(vlm.connector)
    weights = 6 * ((P - Q) * n_t + (Q + n_weight(vlm.decoder.lm_head)) * n_s)
    attention = 6 * decoder.n_layer * decoder.n_head * decoder.head_dim * work.n_token * n_t
    tower = 2 * W * n_v + 4 * n_patch * vision.n_embd * vision.depth * n_v
    return weights + attention + tower + 6 * C * n_c


def measure_memory(cfg, name):
    """Peak memory of a process that does nothing but two steps of one side."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(memory_of_two_steps, replace(cfg, compile=False), name).result()


def memory_of_two_steps(cfg, name):
    torch.set_num_threads(cfg.threads)
    work = plan_work(cfg)
    model = make_models(cfg, work)[name]
    step = make_step(name, model, cfg, work, torch.device("cpu"))
    before = process_bytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                  # what was held for a moment earlier does not count
    step()
    step()
    peak = process_bytes("VmHWM")
    return {"peak_bytes": peak, "step_bytes": peak - before}


def process_bytes(key):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def print_result(r):
    print(f"$ {r['command']}")
    compiled = ", compiled" if r["compile"] else ""
    if compiled and not r["compile_peer"]:
        compiled += " here alone"
    print(f"{r['program']}: {r['preset']}, {r['parameters'] / 1e6:.1f}M parameters, {r['vocab']:,} words, "
          f"{r['rows']} rows of {r['tokens']} tokens, {r['supervised']} of an answer, "
          f"{r['dtype']}{compiled}, {r['device']}, {r['threads']} threads, torch {r['torch']}")

    print(" " * 14 + "       ms    least     most   tokens   tokens/s    MFU  peak MB  step MB")
    for name, side in r["sides"].items():
        line = f"{name:14}"
        for key in ("seconds", "least", "most"):
            line += f"{1e3 * side[key]:9.1f}"
        line += f"{side['tokens']:9,}{side['tokens_per_second']:11,.0f}"
        line += f"{side['mfu']:7.1%}" if "mfu" in side else " " * 7
        if "peak_bytes" in side:
            line += f"{side['peak_bytes'] / 1e6:9,.0f}{side['step_bytes'] / 1e6:9,.0f}"
        print(line)

    if r["peer"]:
        low, high = r["ratio_spread"]
        print(f"{r['ratio']:.2f} times as fast ({low:.2f} to {high:.2f})")
        if r["program"] == "sample":
            print(f"{r['agreement']:.0%} of the tokens are the same")
        else:
            print(f"the losses agree to {r['agreement']:.0e}")
        ours, theirs = r["sides"].values()
        if "peak_bytes" in ours:
            print(f"peak memory {ours['peak_bytes'] / theirs['peak_bytes']:.2f} times, "
                  f"of the step alone {ours['step_bytes'] / theirs['step_bytes']:.2f} times")
    print(f"a square matrix product: {r['matmul'] / 1e9:,.0f} GFLOP/s")
    if r["program"] == "train":
        print(f"a step: {r['flops'] / 1e9:,.1f} GFLOP")


if __name__ == "__main__":
    sys.exit(run(main))
