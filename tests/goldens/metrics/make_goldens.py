"""Makes pairs.json and scores.json: 200 short answers and 200 captions, all made up, and their
scores by the reference implementations.

    pip install sacrebleu==2.6.0 anls==0.0.2
    pip install --no-deps pycocoevalcap==1.2
    python tests/goldens/metrics/make_goldens.py VQA_EVAL SQUAD_EVAL

VQA_EVAL: PythonEvaluationTools/vqaEvaluation/vqaEval.py of github.com/GT-Vision-Lab/VQA, its two
print statements changed for Python 3 and its tabs expanded. SQUAD_EVAL: evaluate-v2.0.py of SQuAD.
CIDEr gets words in lower case without punctuation, as pycocoevalcap leaves tokenising to Java.
"""

import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ANSWERS: Any = (
    "yes|no|two|2|Two.|10|ten|none|zero|0|a cat|the cat|cat|Cat|dog's|don't|dont|isnt|couldnt've|"
    "1,000|1000|1.5|3.|U.S.A.|red, white and blue|red white blue|red/white|t-shirt|tshirt|t shirt|"
    "on the table|on table|(left)|left|left?|o'clock|3 oclock|somebody'd|Yes!|YES|an apple|apple|"
    "café|cafe|naïve|Ünïcödé|猫|二匹の猫|🐈|  spaces  |tab\there|new\nline|a|the|?|-|5-10|5 - 10|"
    "brown and white|brown white|brown & white|black_and_white|i don't know|cell phone|cellphone|"
    "hot dog|hotdog|coca cola|Coca Cola Company|CocaCola|x > y|[none]|{1}|100%|$5|£3.50|nike|Nike."
)
SUBJECTS: Any = "A man|Two women|The small dog|An old tree|Some children|A red bus|People"
VERBS: Any = "is riding|are holding|sits near|runs past|stands on|is looking at|play with"
OBJECTS: Any = "a wave|the umbrella|a wooden bench|an empty street|the green field|a ball"
ENDS: Any = "|.|, in the rain.| at night|  on a sunny day!| near the café| (left)"
ANSWERS, SUBJECTS, VERBS, OBJECTS, ENDS = (
    text.split("|") for text in (ANSWERS, SUBJECTS, VERBS, OBJECTS, ENDS)
)


def make_pairs():
    """Lists of {"predicted", "references"}: ten references to a short answer, one to five else."""
    rng = random.Random(0)
    short = []
    for _ in range(200):
        start = rng.randrange(len(ANSWERS))  # neighbours are spellings of one answer
        known = [
            vary(rng.choice(ANSWERS[start : start + 3]), rng) for _ in range(rng.randint(1, 4))
        ]
        references = [rng.choice(known) for _ in range(10)]
        predicted = vary(rng.choice([*known, *known, rng.choice(ANSWERS), ""]), rng)
        short.append({"predicted": predicted, "references": references})
    captions = []
    for i in range(200):
        references = [caption(rng) for _ in range(rng.randint(1, 5))]
        words = rng.choice(references).split()
        for _ in range(rng.randint(0, 4)):
            words.insert(rng.randrange(len(words) + 1), rng.choice(caption(rng).split()))
            words.pop(rng.randrange(len(words)))
        predicted = "" if i % 50 == 7 else " ".join(words)
        captions.append({"predicted": predicted, "references": references})
    return {"short": short, "captions": captions}


def vary(answer, rng):
    """Half of the answers as they are, the others spelled in another way."""
    place, other = rng.randrange(len(answer) + 1), rng.choice(ANSWERS)
    changed = (f"the {answer}", f"{answer}.", answer.upper(), answer.replace("'", ""))
    changed += (answer[:place] + answer[place + 1 :], f"{answer[:place]}x{answer[place:]}")
    changed += (f"{answer} {other}", f"{answer}, {other}")
    return rng.choice((*changed, *[answer] * len(changed)))


def caption(rng):
    return " ".join(map(rng.choice, (SUBJECTS, VERBS, OBJECTS))) + rng.choice(ENDS)


def load(path, name):
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vqa_scores(pairs, module):
    class Questions:
        def __init__(self, qa):
            self.qa = qa

        def getQuesIds(self):
            return list(self.qa)

    def entry(pair):
        answers = [{"answer": x, "answer_id": i} for i, x in enumerate(pair["references"])]
        return {"answers": answers, "question_type": "q", "answer_type": "a"}

    truth = {i: entry(pair) for i, pair in enumerate(pairs)}
    found = {i: {"answer": pair["predicted"]} for i, pair in enumerate(pairs)}
    scorer = module.VQAEval(Questions(truth), Questions(found), n=12)
    scorer.evaluate()
    return [scorer.evalQA[i] / 100 for i in range(len(pairs))]


def squad_f1(pairs, module):
    answers = [[{"text": text} for text in pair["references"]] for pair in pairs]
    questions = [{"id": i, "answers": texts} for i, texts in enumerate(answers)]
    predictions = {i: pair["predicted"] for i, pair in enumerate(pairs)}
    _, f1 = module.get_raw_scores([{"paragraphs": [{"qas": questions}]}], predictions)
    return [f1[i] for i in range(len(pairs))]


def cider_scores(pairs):
    from pycocoevalcap.cider.cider import Cider  # pyright: ignore[reportMissingImports]

    def words(text):
        return " ".join(re.findall(r"\w+", text.lower()))

    truth = {i: [words(text) for text in pair["references"]] for i, pair in enumerate(pairs)}
    found = {i: [words(pair["predicted"])] for i, pair in enumerate(pairs)}
    return [float(x) for x in Cider().compute_score(truth, found)[1]]


def corpus_scores(pairs):
    import sacrebleu

    most = max(len(pair["references"]) for pair in pairs)
    streams: Any = [
        [dict(enumerate(pair["references"])).get(i) for pair in pairs] for i in range(most)
    ]
    predictions = [pair["predicted"] for pair in pairs]
    return {
        "bleu": sacrebleu.corpus_bleu(predictions, streams).score,
        "chrf": sacrebleu.corpus_chrf(predictions, streams).score,
    }


def main(vqa_path, squad_path):
    from anls import anls_score  # pyright: ignore[reportMissingImports]

    vqa, squad = load(vqa_path, "vqa_eval"), load(squad_path, "squad_eval")
    pairs = make_pairs()
    scores = {
        name: {
            "anls": [anls_score(pair["predicted"], pair["references"]) for pair in each],
            "f1": squad_f1(each, squad),
            **corpus_scores(each),
        }
        for name, each in pairs.items()
    }
    scores["short"]["vqa_accuracy"] = vqa_scores(pairs["short"], vqa)
    scores["captions"]["cider"] = cider_scores(pairs["captions"])
    for name, value in (("pairs", pairs), ("scores", scores)):
        text = json.dumps(value, indent=None, ensure_ascii=False, separators=(",", ":"))
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
