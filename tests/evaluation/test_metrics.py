"""Metrics against values from the papers' own examples, other implementations and by hand; and functions of the user's own."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trace_dist.config import EvalConfig
from trace_dist.data import Task, encode_prompt
from trace_dist.evaluation import evaluate_task, greedy_decode
from trace_dist.evaluation.metric import check_metric, load_metric
from trace_dist.evaluation.metrics.numeric import last_number
from trace_dist.parts import METRICS

GENERATED = [name for name in METRICS if name not in ("choice", "bits_per_byte", "top1")]


def make_task(metric: str, *rows: dict[str, Any], options: dict[str, Any] | None = None) -> Task:
    test = datasets.Dataset.from_list(list(rows) or [{"prompt": "p", "answer": "a"}])
    return Task("t", test, test, None, metric, 0.0, 0.0, options or {})


def score(metric: str, said: str, *references: str, prompt: str = "", **options: Any) -> float:
    compare = load_metric(make_task(metric, options=options)).compare
    assert compare is not None
    return compare(said, list(references), prompt)


@pytest.mark.parametrize(
    ("metric", "said", "references", "expected"),
    [
        ("exact_match", "a", ["a"], 1),
        ("exact_match", "A", ["a"], 0),
        ("exact_match", "b", ["a", "b"], 1),
        # Articles, case and punctuation left out, cat and sat are shared of cat it sat down and cat sat here.
        ("token_f1", "The cat, it sat down", ["a Cat sat... here"], 2 * 2 / 7),
        ("token_f1", "cat cat", ["cat"], 2 * 1 / 3),
        ("token_f1", "the", ["a"], 1),
        ("token_f1", "the", ["cat"], 0),
        ("token_f1", "x", ["y", "x"], 1),
        # The example of Lin (2004), section 3.1, and its scores.
        ("rouge_l", "police kill the gunman", ["police killed the gunman"], 3 / 4),
        ("rouge_l", "the gunman kill police", ["police killed the gunman"], 2 / 4),
        ("rouge_l", "the gunman police killed", ["nothing", "police killed the gunman"], 2 / 4),
        ("rouge_l", "die Höhe über", ["DIE höhe"], 2 * 2 / 5),
        ("rouge_l", "你好世", ["你好"], 2 * 2 / 5),
        # What need not be deleted or inserted is the longest common subsequence: ittn.
        ("edit_similarity", "kitten", ["sitting"], 2 * 4 / 13),
        ("edit_similarity", "abc", ["x", "abc"], 1),
        ("numeric", "so it is 1,234.50 $", ["#### 1234.5"], 1),
        ("numeric", "5", ["6"], 0),
        ("numeric", "none", ["6"], 0),
        ("numeric", "first 6, then 5", ["6"], 0),
        ("numeric", "yes", ["yes"], 1),
        ("numeric", "50%", ["49", "50"], 1),
    ],
)  # fmt: skip
def test_values(metric: str, said: str, references: list[str], expected: float) -> None:
    assert score(metric, said, *references) == pytest.approx(expected)


def test_options() -> None:
    assert score("exact_match", "B, since", "B because", first=1) == 1
    assert score("exact_match", "C, since", "B because", first=1) == 0
    assert score("numeric", "10.4", "10", tolerance=0.05) == 1
    assert score("numeric", "10.6", "10", tolerance=0.05) == 0
    assert score("bleu", "你好世界", "你好世界", tokenize="zh") == pytest.approx(1)
    for metric, options, message in (
        ("numeric", {"tolerence": 1}, "'tolerence' is not an option; its options are tolerance"),
        ("numeric", {"tolerance": -1}, r"tolerance=-1.*must be at least 0"),
        ("exact_match", {"first": 0}, r"first=0: must be at least 1"),
        ("bleu", {"tokenize": "words"}, "tokenize='words': must be one of 13a"),
        ("rouge_l", {"x": 1}, "it has no options"),
    ):
        with pytest.raises(ValueError, match=message):
            check_metric(make_task(metric, options=options))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5-3", 3), ("covid-19", 19), ("x = -3", -3), ("\u22122.5", -2.5), ("(7)", 7), ("$42", 42), ("1/4", 4),
        ("a loss of -$1,250.50", -1250.5), ("\u2212\u20ac7", -7), ("+£3", 3), ("$5-$3", 3), ("$-4", -4),
        ("1,234,567", 1234567), ("1,2345", 2345), ("12,34", 34), ("3 apples", 3), ("no", None), ("", None),
        (".5", 0.5), ("-.5", -0.5), ("5.", 5), ("1e-3", 1e-3),
    ],
)  # fmt: skip
def test_the_last_number(text: str, number: float | None) -> None:
    found = last_number(text)
    assert (found if found is None else float(found)) == number


@pytest.mark.parametrize(
    ("said", "reference", "options", "expected"),
    [
        ("12345679", "12345678", {}, 0),
        ("12,345,678", "+012345678", {}, 1),
        ("-0", "0", {}, 1),
        ("12345679", "12345678", {"tolerance": 1e-6}, 1),
        ("12345679", "12345678", {"tolerance": 0}, 0),
        ("12345678.0", "12345678", {}, 1),
        ("0.3333333", "0.33333333", {}, 1),
        ("9" * 5000, "9" * 4999 + "8", {}, 0),
        ("0" + "9" * 5000, "9" * 5000, {}, 1),
        ("1e400", "2e400", {}, 0),
        ("1e400", "2e400", {"tolerance": 0.1}, 0),
        ("so 1e400", "1e400", {}, 1),
        ("1e400", "5", {"tolerance": 1}, 0),
    ],
)  # fmt: skip
def test_integers_are_compared_digit_by_digit(
    said: str, reference: str, options: dict[str, Any], expected: float
) -> None:
    assert score("numeric", said, reference, **options) == expected


def test_rouge_of_ascii_texts_is_rouge_scores_own() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    texts = ["The quick_brown fox, jumps!", "a quick brown dog jumps over it's 12.5", "", "12 5 dog"]
    own = RougeScorer(["rougeL"])
    for said in texts:
        for reference in texts:
            expected = own.score(reference, said)["rougeL"].fmeasure
            assert score("rouge_l", said, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("हिन्दू की", "हिन्दी का", 0),
        ("हिन्दी की किताब", "हिन्दी का किताब", 2 / 3),
        ("தமிழ் மொழி", "தமிழ் மொழி", 1),
        ("กิน", "กัน", 0.5),
        ("我喜欢 Tee", "我喜欢 Kaffee", 3 / 4),
        ("cafe\u0301 noir", "café noir", 1),
        ("cafe noir", "café noir", 0.5),
    ],
)
def test_rouge_of_other_scripts_compares_letters_with_their_marks(
    said: str, reference: str, expected: float
) -> None:
    assert score("rouge_l", said, reference) == pytest.approx(expected)


SOURCE = "About 95 species are currently accepted."
REFERENCES = (
    "About 95 species are currently known.",
    "About 95 species are now accepted.",
    "95 species are now accepted.",
)


def test_sari_of_the_example_in_its_first_implementation() -> None:
    """The example of Xu et al.'s own script; 26.95 is what the package `evaluate` states for it."""
    found = score("sari", "About 95 you now get in.", *REFERENCES, prompt=SOURCE)
    assert 100 * found == pytest.approx(26.953601953601954)


def test_sari_by_hand() -> None:
    """Source a b c, output a c d, reference a d. Longer n-grams than a text has are 0 / 0 = 1."""
    # 1-grams. keep: kept a c, rightly a: precision 1/2, of the kept ones (a) all: recall 1. delete: b, rightly. add: d, rightly.
    one = (2 * 0.5 * 1 / 1.5, 1.0, 1.0)
    # 2-grams. source ab bc, output ac cd, reference ad. keep: nothing kept (1), nothing to keep (1). delete: ab bc, rightly.
    # add: ac cd, none right: precision 0, recall 0.
    two = (1.0, 1.0, 0.0)
    # 3-grams. source abc, output acd, reference none. keep 1. delete: abc, rightly. add: acd, wrong (0), nothing due (1).
    three = (1.0, 1.0, 0.0)
    # 4-grams. There are none.
    four = (1.0, 1.0, 1.0)
    expected = sum(map(sum, (one, two, three, four))) / 12
    assert score("sari", "a c d", "a d", prompt="a b c") == pytest.approx(expected)
    assert score("sari", "a d", "a d", prompt="a b c") == pytest.approx(1)


def test_chrf_and_bleu_by_hand() -> None:
    # BLEU of 3 words, of which the longest n-gram that exists is 3: precisions 3/3, 2/2, 1/1, length 3 of 4.
    assert score("bleu", "the cat sat", "the cat sat down") == pytest.approx(math.exp(1 - 4 / 3))
    assert score("bleu", "the cat sat", "something", "the cat sat") == pytest.approx(1)
    # chrF of "ab" and "ac": precision and recall of 1-grams are 1/2, of 2-grams 0; there are no longer ones.
    assert score("chrf", "ab", "ac") == pytest.approx((1 / 2 + 0) / 2)
    assert score("chrf", "ab", "zz", "ab") == pytest.approx(1)


@pytest.mark.parametrize("metric", GENERATED)
def test_every_metric_is_within_bounds_best_for_a_reference_and_takes_the_best_reference(metric: str) -> None:
    text = "In total it is 12 and nothing else at all."
    others = ["In total it was 13.", "something 9", ""]
    for said in (text, *others):
        for reference in (text, *others):
            assert 0 <= score(metric, said, reference, prompt="What is it in total?") <= 1
    assert score(metric, text, text, prompt="What is it in total?") == pytest.approx(1)
    if metric != "sari":  # which takes all references together
        alone = [score(metric, others[0], each) for each in (text, others[1])]
        assert score(metric, others[0], text, others[1]) == pytest.approx(max(alone))
    check_metric(make_task(metric))


@pytest.mark.parametrize(
    ("metric", "package"),
    [
        *((name, "sacrebleu") for name in ("chrf", "bleu", "sari")),
        ("rouge_l", "rouge_score"),
        ("edit_similarity", "rapidfuzz"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    metric: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"tasks\.t\.metric='{metric}': .*{package}.*trace-dist\[metrics\]"):
        check_metric(make_task(metric))


OWN = """
import numpy
calls = []
VALUE = 3
def length(said, references, prompt):
    calls.append((said, references, prompt))
    return numpy.float32(1 / (1 + abs(len(said) - len(references[0]))))
def large(said, references, prompt): return 2
def nothing(said, references, prompt): return None
def nan(said, references, prompt): return float("nan")
def fails(said, references, prompt): return references["x"]
def two(said, reference): return 1
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metrics").mkdir()
    (tmp_path / "own_metrics/__init__.py").write_text(OWN)
    (tmp_path / "own_metrics/part.py").write_text(
        "label = 'x'\ndef score(said, references, prompt): return 0.25\n"
    )
    (tmp_path / "own_metrics/empty.py").write_text("")
    (tmp_path / "own_metrics/broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("own_metrics")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("own")
def test_a_function_and_a_module_of_ones_own() -> None:
    task = make_task("own_metrics.length", {"prompt": "p", "answer": "ab", "references": ["ab", "c"]})
    check_metric(task)
    calls = sys.modules["own_metrics"].calls
    assert calls == [("ab", ["ab", "c"], "p")]
    assert score("own_metrics.length", "a", "abc") == pytest.approx(1 / 3)
    assert score("own_metrics.part", "a", "abc") == 0.25


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("large", r"gives 2 for 'a', not a number in \[0, 1\]"),
        ("nothing", "gives None for 'a', not a number"),
        ("nan", "gives nan for 'a', not a number"),
        ("fails", "fails on 'a'.*TypeError"),
        ("two", "fails on 'a'.*TypeError.*2 positional arguments"),
        ("absent", "cannot be imported.*own_metrics.absent"),
        ("broken", "cannot be imported.*ZeroDivisionError"),
        ("empty", "the module has no function score"),
        ("VALUE", "cannot be imported"),
    ],
)
def test_a_function_that_does_not_fit_is_found_before_any_work(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"metric='own_metrics\.{name}'.*{message}") as error:
        check_metric(make_task(f"own_metrics.{name}"))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("own")
def test_options_of_a_function_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tasks\.t\.metric_options=.*has none"):
        check_metric(make_task("own_metrics.length", options={"a": 1}))


def test_a_task_is_scored_by_its_metric_example_by_example(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = ["abc", "fgh", "dead", "cab"]
    said = greedy_decode(model, tokenizer, encode_prompt(prompts, tokenizer), batch_size=4, max_new_tokens=5)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
    rows = [
        {"prompt": prompt, "answer": "a", "references": ["a", f"{text}h"]}
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    found = evaluate_task(model, tokenizer, make_task("edit_similarity", *rows), EvalConfig(max_new_tokens=5))
    expected = [score("edit_similarity", text, "a", f"{text}h") for text in texts]
    assert found.per_example == pytest.approx(expected)
    assert found.value == pytest.approx(100 * sum(expected) / len(expected))
    assert len(set(expected)) > 1
