"""The papers' benchmarks by family, each as its authors score it."""

from benchmarks import choice, grounding, judged, reasoning, vqa, yes_no

BENCHMARKS = (
    vqa.BENCHMARKS
    | yes_no.BENCHMARKS
    | choice.BENCHMARKS
    | grounding.BENCHMARKS
    | reasoning.BENCHMARKS
    | judged.BENCHMARKS
)
