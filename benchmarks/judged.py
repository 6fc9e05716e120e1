"""Open answers that GPT-4 grades: LLaVA-Bench (In-the-Wild), MM-Vet.

    (a picture of a street)   Describe this photo in detail.
    a model: "The photo shows ..."      GPT-4: "8 6\\nAssistant 1 names ..."      score 100 * 6 / 8

Asked of a model, these two give no score: judge_requests.jsonl holds one request a line, as the authors word
it, ready to send. What comes back is read by --predictions, rows with an id and `content` (LLaVA-Bench's
reviews) or `score` (MM-Vet's grades), and scored as the authors score it.
  LLaVA-Bench  arXiv:2304.08485. 100 x the model's mean score / that of GPT-4's own answers, which it is shown
  MM-Vet       arXiv:2308.02490. 100 x the mean of grades from 0 to 1
"""

import math
from functools import partial

from benchmarks.common import Benchmark, as_said, percent_right, question, read_split, rows_by
from support.io import json_lines

# ---- LLaVA-Bench ----

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user "
    "question displayed above. The user asks the question on observing an image. For your reference, the "
    "visual content in the image is represented with a few sentences describing the image. \nPlease rate the "
    "helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\nPlease "
    "first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\nIn the subsequent line, please provide a "
    "comprehensive explanation of your evaluation, avoiding any potential bias and ensuring that the order "
    "in which the responses were presented does not affect your judgment."
)


def read_llava_bench(cfg):
    pictures = rows_by(cfg, "image", "context.jsonl")
    references = rows_by(cfg, "question_id", "answers_gpt4.jsonl")

    def ask(cfg, key, row):
        id = row["question_id"]
        image = row["image"]
        caption = pictures[image]["caption"]
        return question(
            id,
            f"images/{image}",
            row["text"],
            "",
            references[id]["text"] + "",
            row["category"].removeprefix("llava_bench_"),
            caption="\n".join([caption] if isinstance(caption, str) else caption),
        )

    return read_split("questions.jsonl", "all", ask, cfg)


def review_scores(review, item):
    """The two scores on the first line of a review: of the reference and of the model."""
    try:
        scores = [float(number) for number in review.split("\n")[0].replace(",", " ").split(" ")]
    except ValueError:
        return None
    return scores if len(scores) == 2 and all(map(math.isfinite, scores)) else None


def model_score(scores, item):
    return scores[1] / 10


def score_llava_bench(units):
    """As the official summary does: each mean is rounded, and an unreadable review counts as -1 and -1."""
    pairs = [unit[0]["parsed"] or [-1.0, -1.0] for unit in units]
    reference, model = (round(sum(scores) / len(pairs), 3) for scores in zip(*pairs))
    return round(model / reference * 100, 1) if reference > 0 else float("nan")


def ask_judge_of_answers(item, answer):
    said = (
        f"[Context]\n{item['caption']}\n\n[Question]\n{item['text']}\n\n"
        f"[Assistant 1]\n{item['truth']}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n"
    )
    return {
        "model": "gpt-4-0314",
        "temperature": 0.2,
        "max_tokens": 1024,
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": said}],
    }


# ---- MM-Vet ----

MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries "
    "Iceland and Greenland are misleading. Despite its name, Iceland is known for its beautiful green "
    "landscapes, while Greenland is mostly covered in ice and snow. The meme is saying that the person has "
    "trust issues because the names of these countries do not accurately represent their landscapes. | "
)
EQUATION = "What is x in the equation? | -1 <AND> -5 | x = "
MM_VET = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. "
    "<AND> in the ground truth means it is totally right only when all elements in the ground truth are "
    "present in the prediction, and <OR> means it is totally right when any one element in the ground truth "
    "is present in the prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, "
    "0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
    f"{EQUATION}3 | 0.0\n{EQUATION}-1 | 0.5\n{EQUATION}-5 | 0.5\n{EQUATION}-5 or 5 | 0.5\n{EQUATION}-1 or "
    "x = -5 | 1.0\n"
    f"{MEME}The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland "
    f"is not very icy and Greenland isn't very green. | 0.4\n{MEME}The meme is using humor to point out the "
    "misleading nature of Iceland's and Greenland's names. Iceland, despite its name, has lush green "
    "landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I have trust "
    "issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The "
    "humor in this meme is derived from the unexpected contrast between the names of the countries and their "
    "actual physical characteristics. | 1.0\n"
)


def ask_mm_vet(cfg, id, row):
    return question(
        str(id),
        f"images/{row.get('imagename') or f'{id}.png'}",
        row["question"],
        "",
        row["answer"] + "",
        list(row["capability"]),
    )


def mean_grade(grade, item):
    """The mean of the judge's runs, numbers from 0 to 1."""
    grades = [float(number) for number in grade.strip("[]").split(",")]
    if not all(0 <= number <= 1 for number in grades):
        raise ValueError(f"grade {grade}; it must be from 0 to 1")
    return sum(grades) / len(grades)


def score_mm_vet(units):
    return round(percent_right(units), 1)


def ask_judge_of_facts(item, answer):
    truth = item["truth"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    said = f"{MM_VET}\n{item['text']} | {truth} | {answer} | "
    return {
        "model": "gpt-4-0613",
        "temperature": 0,
        "max_tokens": 3,
        "messages": [{"role": "user", "content": said}],
    }


# ---- both ----


def submit_requests(ask_judge, items, records):
    rows = [
        {"question_id": item["id"]} | ask_judge(item, record["answer"] or "")
        for item, record in zip(items, records)
    ]
    return "judge_requests.jsonl", json_lines(rows)


BENCHMARKS = {
    "llava-bench": Benchmark(
        read_llava_bench,
        review_scores,
        model_score,
        score_llava_bench,
        submit=partial(submit_requests, ask_judge_of_answers),
        review="content",
        max_new_tokens=1024,
        metric="relative score by GPT-4",
    ),
    "mm-vet": Benchmark(
        partial(read_split, "mm-vet.json", "all", ask_mm_vet),
        mean_grade,
        as_said,
        score_mm_vet,
        submit=partial(submit_requests, ask_judge_of_facts),
        review="score",
        max_new_tokens=1024,
        metric="score by GPT-4, of 100",
    ),
}
