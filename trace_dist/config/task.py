"""One task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trace_dist.config.checks import Section, check
from trace_dist.parts import METRICS
from trace_dist.utils.braces import columns_of
from trace_dist.utils.names import check_task_name

_READING = (
    "subset", "revision", "split", "test_split", "validation_split", "validation_path",
    "prompt_field", "answer_field", "prompt_template", "answer_template", "messages_field",
)  # fmt: skip
"""Fields that say how a path is read."""
_EITHER = (
    ("prompt_field", "prompt_template"),
    ("answer_field", "answer_template"),
    ("validation_split", "validation_path"),
    *(
        ("messages_field", f"{part}_{kind}")
        for part in ("prompt", "answer")
        for kind in ("field", "template")
    ),
)
"""Fields of which a task may have one."""


@dataclass(frozen=True)
class TaskConfig(Section):
    """One task: prompts and answers from exactly one source (path or reasoning_gym)."""

    name: str
    """Name used in files and tables."""
    path: str | None = None
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder with train and test files, a folder as on the hub or of
    datasets.save_to_disk, a folder of images (one per class), the id of a dataset on the hub, such as openai/gsm8k, or images
    that come with a package: images:digits, images:letters, images:mnist."""
    reasoning_gym: dict[str, Any] | None = None
    """`{dataset: spell_backward, min_word_len: 5, ...}`: a procedural reasoning-gym dataset and its options."""
    subset: str | None = None
    """Configuration of a hub dataset that has several, such as main."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str | None = None
    """Split to train on, such as train_sft or train[:90%]; train when not set."""
    test_split: str | None = None
    """Split to test on; when not set, test, else on the hub validation, else one prompt in ten of the training split."""
    validation_split: str | None = None
    """Split to validate on where `train.eval_every` is set, such as validation or train[90%:]; when not set, validation, dev
    or eval where the source has one that is not tested, else examples are held out of the training split."""
    validation_path: str | None = None
    """File with the validation examples, in the columns of `path`; when not set, `quiz.validation.csv` beside `quiz.csv`."""
    prompt_field: str | None = None
    """Column with the prompt; known names (docs/data.md) are found without it."""
    answer_field: str | None = None
    """Column with the answer, or with a list of references, of which the first is trained and the best counts."""
    prompt_template: str | None = None
    """Text with columns in braces, such as "{question}\\n{context}", instead of prompt_field; {{ and }} are braces."""
    answer_template: str | None = None
    """As prompt_template, for the answer."""
    messages_field: str | None = None
    """Column with conversations (role and content, or from and value); every assistant turn is trained, the last one scored."""
    num_train: int = 4000
    """Training examples used (fewer if the source has fewer)."""
    num_test: int = 200
    """Test examples used (fewer if the source has fewer)."""
    num_validation: int = 200
    """Validation examples used; held out, they are at most a fifth of the training examples."""
    answers: list[str] | None = None
    """Answers whose examples are used, such as the classes that a task of a class-incremental stream adds; all when not set."""
    metric: str = "exact_match"
    """exact_match, choice (the likeliest of all answers), numeric (the last number), token_f1, rouge_l, chrf, bleu,
    edit_similarity, sari, bits_per_byte (of the answer, for general sets), top1 (the class of an
    image), or the path of a Python function
    `(said, references, prompt) -> score in [0, 1]`, such as my_pkg.my_metric."""
    metric_options: dict[str, Any] = field(default_factory=dict)
    """Options of the metric, such as `{tolerance: 0.01}` of numeric; the metrics' files explain them."""
    steps: int | None = None
    """Optimizer steps for this task; the train section's value when not set."""

    list_name: ClassVar[str] = "tasks"
    """The list of the run that it stands in."""

    @property
    def where(self) -> str:
        return f"{self.list_name}.{self.name}"

    def check(self) -> None:
        sources = {"path": self.path, "reasoning_gym": self.reasoning_gym}
        rule = "exactly one of path and reasoning_gym must be set"
        check(list(sources.values()).count(None) == 1, self.where, sources, rule, "give the task one source")
        check_task_name(self.name)
        if self.reasoning_gym is not None:
            options, cure = self.reasoning_gym, "name the reasoning-gym dataset"
            name = f"{self.where}.reasoning_gym"
            check("dataset" in options, name, options, "needs the key 'dataset'", cure)
            for key in _READING:
                value, rule = getattr(self, key), "says how a path is read, but the source is reasoning_gym"
                check(value is None, f"{self.where}.{key}", value, rule, "leave it out")
        self.at_least(1, "num_train", "num_test", "num_validation", "steps")
        self._check_columns()
        METRICS.check(self.metric, f"{self.where}.metric")

    def _check_columns(self) -> None:
        for one, other in _EITHER:
            both = None not in (getattr(self, one), getattr(self, other))
            value, rule = getattr(self, other), f"{one} is set too, and says the same thing"
            check(not both, f"{self.where}.{other}", value, rule, "keep one of them")
        for key in ("prompt_template", "answer_template"):
            template = getattr(self, key)
            try:
                named = columns_of(template) if template is not None else [key]
            except ValueError as error:
                cure = "write {column}, and {{ and }} for braces"
                check(False, f"{self.where}.{key}", template, str(error).lower(), cure)
            check(bool(named), f"{self.where}.{key}", template, "names no column", "write {column}")


@dataclass(frozen=True)
class GeneralConfig(TaskConfig):
    """A general set: what the base can do. Of a task it has the fields that training does not read."""

    list_name: ClassVar[str] = "general"
