"""Flags that a first reading does not need: of a large or unusual training, and of how a model is asked."""

import sys
from dataclasses import dataclass

from conversation import TEMPLATES
from model import CONNECTORS
from support.cli import arg, parse
from support.lora import LORA_TARGETS
from support.tiling import MAX_TILES
from vision import MODES


@dataclass
class MoreFlags:
    """What train.TrainConfig has besides its own."""

    # What is taught, and to which parts
    data_weights: str = arg("",
        "how often an epoch shows each file of --data, X,X; empty: once, or as meta.json says")
    data_fraction: float = arg(1.0,
        "share of the records to train on; a smaller one is part of a larger one of the same --seed",
        above=0, at_most=1)
    split_questions: bool = arg(False, "each question of a conversation with its answer as its own record")
    bad_records: str = arg("stop",
        "what to do with a record that cannot be used: stop, or skip and count", choices=("stop", "skip"))
    tokenizer: str = arg("",
        "sentencepiece tokenizer.model of a preset, or a directory that holds one; empty: the decoder's own")
    connector: str = arg("", "of a preset; empty: its own", choices=CONNECTORS)
    from_scratch: bool = arg(False, "start from random weights where the preset has trained ones")
    lora_r: int = arg(0, "rank of a LoRA on the decoder, which is trained instead of it; 0: none",
        at_most=65536)
    lora_alpha: float = arg(0.0, "a LoRA counts alpha / r times; 0: twice r, as LLaVA has it")
    lora_dropout: float = arg(0.0, "share of a LoRA's inputs that are dropped", below=1)
    lora_target: str = arg("", "linear layers of the decoder with a LoRA; empty: all", choices=LORA_TARGETS)

    # How a picture becomes tiles
    image_size: int = arg(0,
        "pixels a side of the tile of a preset's --vision; 0: the tower's own, of two the second's",
        at_most=4096)
    max_tiles: int = arg(0,
        "most tiles of a picture in modes hd and internvl; 0: the model's own, or 6 and 12",
        at_most=MAX_TILES)
    global_view: str = arg("",
        "where the whole picture stands as one more tile; empty: as the mode has it",
        choices=("first", "last", "none"))
    augment: bool = arg(False,
        "of each picture a random part, and half of them mirrored; not where questions speak of places")

    # Steps and rates
    token_budget: int = arg(0,
        "tokens in memory at once, padding counted: a step's records are sorted by length and cut to fit; 0: "
        "as --micro-batch-size")
    lr_connector: float = arg(0.0, "the connector's own; 0: as --lr")
    lr_vision: float = arg(0.0, "the towers' own; 0: as --lr")
    minutes: float = arg(0.0,
        "as many steps as fit into so many minutes at the speed of the first few; 0: as --max-steps says")
    log_every: int = arg(10, "steps between printed lines", at_least=1)
    eval_limit: int = arg(0, "answer only this many held-out questions, drawn once for all; 0: all")

    # The machine
    workers: int = arg(1, "processes that prepare records; 0: none", at_most=256)
    threads: int = arg(0,
        "threads that compute on a CPU, of a small model each its own micro-batches; 0: one a core",
        at_most=1024)
    device: str = arg("auto", "cpu, cuda, cuda:N, mps (Apple's; untested) or auto")
    dtype: str = arg("auto",
        "bfloat16: autocast; auto: that on a GPU, float32 on a CPU",
        choices=("float32", "bfloat16", "auto"))
    weights: str = arg("float32",
        "bfloat16: what that cuts off is kept beside the optimizer, so that no small step is lost",
        choices=("float32", "bfloat16"))
    recompute: int = arg(0,
        "blocks of the decoder, from the first, that keep no activations but compute them twice: less "
        "memory, more time")
    compile: bool = arg(None,
        "torch.compile the blocks: a minute or two first, then faster; auto: on a GPU")
    shard: bool = arg(False,
        "under torchrun: FSDP2, weights and optimizer in shards; --no-shard: each process has all")
    dry_run: bool = arg(False, "say what the run would train, need and take, read no weights, and end")


def parse_with_recipe(Config, argv, description, recipes):
    """The recipe of (--model, --stage) replaces defaults, the command line replaces both."""
    argv = sys.argv[1:] if argv is None else argv

    # A first look finds the recipe, and what else some flags change in the defaults of others.
    given = parse(Config, [word for word in argv if word not in ("-h", "--help")])
    recipe = dict(recipes.get((given.model, given.stage), {}))
    if any(word.startswith("--epochs") for word in argv):
        recipe["max_steps"] = 0
    if given.from_scratch:
        recipe |= dict(vision="", llm="", projector="")
    elif given.vision or given.llm or given.connector or given.image_mode == "internvl":
        # Not of the shape of the recipe's connector: another tower or decoder, or internvl's pixel shuffle.
        recipe["projector"] = ""
    return parse(Config, argv, description, recipe)


@dataclass
class ModelConfig:
    """Which model answers: in sample.py, eval.py and pairs.py."""

    model: str = arg("", "model directory; empty: the newest finished run under out/")
    vision: str = arg("", "tower of a model that was published without, DIR or DIR,DIR")
    llm: str = arg("", "directory of the base of a LoRA")
    template: str = arg("", "conversation template; empty: the model's own", choices=TEMPLATES)
    image_mode: str = arg("", "how a picture becomes tiles; empty: the model's own", choices=MODES)
    device: str = arg("auto", "cpu, cuda, cuda:N, mps (Apple's; untested) or auto")
    dtype: str = arg("auto",
        "of the weights; auto: as stored, but bfloat16 for float16 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"))
    quantize: str = arg("", "int8: the decoder's matrices in 8 bits, half the memory", choices=("int8",))


@dataclass
class AskConfig(ModelConfig):
    """And how, unless it is an evaluation."""

    temperature: float = arg(0.0, "0 takes the likeliest word, more draws at random")
    top_p: float = arg(1.0,
        "draw from the smallest set of words that holds this probability", above=0, at_most=1)
    top_k: int = arg(0, "draw from this many likeliest words; 0: all")
    max_new_tokens: int = arg(256, "longest answer in tokens", at_least=1)
    seed: int = arg(0, "of the draws", below=2**30)

    @property
    def sampling(self):
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed")}
