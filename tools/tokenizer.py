"""Make a tokenizer of the words of one's own records, for a decoder that starts from random weights.

    python -m tools.tokenizer FILE --out DIR
    python train.py --model photo --tokenizer DIR --data FILE ...
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from conversation import Tokenizer
from support.cli import REQUIRED, UserError, arg, parse, run_program
from support.data_files import Records
from support.io import write_whole


@dataclass
class TokenizerConfig:
    file: str = arg(REQUIRED, "JSON list or JSON lines of records", positional=True)
    out: str = arg(REQUIRED, "folder for tokenizer.model")
    vocab_size: int = arg(512,
        "tokens in all, of few words fewer: 259 bytes and marks, then characters, parts of words, words",
        at_least=260)


def main(argv=None):
    cfg = parse(TokenizerConfig, argv, __doc__)
    path = Path(cfg.out) / "tokenizer.model"
    if (path.parent / "config.json").exists():
        raise UserError(f"--out {cfg.out}: a model is there, with its tokenizer; give another folder")
    records = Records(cfg.file)
    words = []
    for record in records:
        for _, text in record["turns"]:
            words += text.replace("<image>", " ").split()
    pieces = (word[k : k + 1000] for word in words for k in range(0, len(word), 1000))  # long lines are lost
    write_whole(path, lambda tmp: train_tokenizer(tmp, pieces, cfg.vocab_size))

    tok = Tokenizer(path)
    counts = Counter(re.findall(r"\w+", " ".join(words)))
    n_whole = sum(count for word, count in counts.items() if len(tok.encode(word)) == 1)
    share = f"{n_whole / max(1, counts.total()):.1%} are one token"
    print(f"{path}: {tok.n_text} tokens; of {counts.total():,} words in {len(records):,} records {share}")
    return 0


def train_tokenizer(path, lines, vocab_size, required=""):
    """Write Llama's kind of sentencepiece model: byte pairs, no piece for a newline or two spaces.

    It has fewer than `vocab_size` tokens where the lines have no more parts of words.
    `required`: characters that become pieces however rare they are. The same lines give the same file.
    """
    try:
        with open(path, "wb") as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line.strip() for line in lines), model_writer=model, vocab_size=vocab_size,
                model_type="bpe", byte_fallback=True, character_coverage=1.0, required_chars=required,
                normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
                hard_vocab_limit=False, split_digits=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
                num_threads=1, minloglevel=2)
    except (RuntimeError, TypeError, ValueError) as error:  # also where a text holds half a surrogate pair
        why = str(error).rpartition("] ")[2].split(" or decrease character_coverage")[0]
        why = why or "they hold no words"
        raise UserError(f"no tokenizer of {vocab_size} tokens can be made of these texts: {why}") from None


if __name__ == "__main__":
    sys.exit(run_program(main))
