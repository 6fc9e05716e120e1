"""The papers' benchmarks by family, each as its authors score it; and what the papers print."""

from benchmarks import choice, grounding, judged, reasoning, vqa, yes_no

BENCHMARKS = (
    vqa.BENCHMARKS
    | yes_no.BENCHMARKS
    | choice.BENCHMARKS
    | grounding.BENCHMARKS
    | reasoning.BENCHMARKS
    | judged.BENCHMARKS
)

# LLaVA-1.5 by its own tables, else by Prismatic's; Prism-DINOSigLIP.
TABLE = """
vqav2: LLaVA-1.5-7B 78.5, LLaVA-1.5-13B 80.0, Prism-7B 80.97, Prism-13B 81.66
vizwiz: LLaVA-1.5-7B 50.0, LLaVA-1.5-13B 53.6, Prism-7B 52.82, Prism-13B 58.01
textvqa: LLaVA-1.5-7B 46.13, LLaVA-1.5-13B 48.99, Prism-7B 55.64, Prism-13B 57.08
textvqa-ocr: LLaVA-1.5-7B 58.2, LLaVA-1.5-13B 61.3, Prism-7B 59.71, Prism-13B 62.89
gqa: LLaVA-1.5-7B 62.0, LLaVA-1.5-13B 63.3, Prism-7B 65.27, Prism-13B 66.13
pope: LLaVA-1.5-7B 85.9, LLaVA-1.5-13B 85.9, InternVL2-8B-MPO 88.1; accuracy: Prism-7B 88.12, Prism-13B 88.07
mme: LLaVA-1.5-7B 1510.7, LLaVA-1.5-13B 1531.3
vsr: LLaVA-1.5-7B 51.47, LLaVA-1.5-13B 69.07, Prism-7B 59.57, Prism-13B 72.18
scienceqa: LLaVA-1.5-13B 74.39; its image context: LLaVA-1.5-7B 66.8, LLaVA-1.5-13B 71.6
mmbench: LLaVA-1.5-7B 64.3, LLaVA-1.5-13B 67.7; v1.1: InternVL2.5-8B-MPO 82.4
mmbench-cn: LLaVA-1.5-7B 58.3, LLaVA-1.5-13B 63.6
seed-bench: LLaVA-1.5-7B 58.6, LLaVA-1.5-13B 61.6; its image half: LLaVA-1.5-7B 66.1, LLaVA-1.5-13B 68.2
ai2d: LLaVA-1.5-7B 54.10, LLaVA-1.5-13B 57.13, Prism-7B 55.65, Prism-13B 57.96, InternVL2.5-8B-MPO 84.5
tallyqa: LLaVA-1.5-7B 62.06, LLaVA-1.5-13B 64.83, Prism-7B 66.70, Prism-13B 70.41
refcoco: LLaVA-1.5-7B 55.12, LLaVA-1.5-13B 66.75, Prism-7B 77.78, Prism-13B 79.39
refcoco+: LLaVA-1.5-7B 49.47, LLaVA-1.5-13B 61.36, Prism-7B 73.08, Prism-13B 75.55
refcocog: LLaVA-1.5-7B 50.92, LLaVA-1.5-13B 60.85, Prism-7B 71.04, Prism-13B 72.73
ocid-ref: LLaVA-1.5-7B 35.07, LLaVA-1.5-13B 45.56, Prism-7B 54.12, Prism-13B 54.62
mathvista: InternVL2.5-8B-MPO 68.9
m3cot: InternVL2-8B-MPO 79.2
llava-bench: LLaVA-1.5-7B 65.4, LLaVA-1.5-13B 72.5
mm-vet: LLaVA-1.5-7B 31.1, LLaVA-1.5-13B 36.1, InternVL2.5-8B-MPO 66.9
"""
PUBLISHED = dict(line.split(": ", 1) for line in TABLE.strip().splitlines())
