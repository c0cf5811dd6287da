"""A bank as a model of lm-evaluation-harness, which is called ``trace-dist`` there once this module is imported.

    import lm_eval, trace_dist.serving.harness
    arguments = "bank=runs/quickstart/bank,base=runs/quickstart/models/target,task=auto"
    lm_eval.simple_evaluate("trace-dist", arguments, tasks=["arc_easy"])

``trace-dist lm-eval`` does that from the command line. The model is the harness's own for Hugging Face models, with its options.
Only the weights change: requests are sorted by the task that answers them, and each task's are scored with its delta. Importing
this module needs lm_eval (``pip install 'trace-dist[lm-eval]'``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from trace_dist.data.examples import Prompt
from trace_dist.serving.finding import Shares
from trace_dist.serving.options import Source, check_task
from trace_dist.serving.router import Router
from trace_dist.utils.log import get_logger
from trace_dist.utils.names import AUTO, BASE

logger = get_logger(__name__)
NAME = "trace-dist"
HARNESS_DEFAULT = "cuda:0"
"""The device that the harness's command line names where nobody does."""
OWN = tuple(field.name for field in fields(Source) if field.name not in ("bank", "base", "batch_size"))


@register_model(NAME)
class BankLM(HFLM):
    """Answers of a bank, of one of its tasks, or of its base.

    A prompt's task is retrieved from the context as the harness gives it: few-shot examples, and of a conversation all turns.
    Where the context is empty the base answers; running text, of which all tokens are scored, is its own prompt.

    Args:
        bank: folder of the bank.
        base: its base model: folder or hub id.
        task: name of a task, ``base``, or ``auto``.
        batch_size: of the harness; prompts are retrieved in batches of this size too, where it is a number.
        device: the harness's; it must be where the base is loaded.
        options: the other fields of ``serving.options.Source``, such as dtype and reject; and those arguments of the harness's
            ``hf`` model that suit a model which is loaded already.

    Raises:
        ValueError: as ``Router.open``, the bank holds no such task, or the device is another one.
    """

    def __init__(
        self,
        bank: str,
        base: str,
        task: str = AUTO,
        batch_size: int | str = 16,
        device: str | None = None,
        **options: Any,
    ) -> None:
        number = int(batch_size) if str(batch_size).isdecimal() else 16
        own = {key: options.pop(key) for key in OWN if key in options}
        source = Source(str(bank), str(base), batch_size=number, **own)
        source.check_alone("lm-eval")
        self.router = Router.of(source)
        self.task = str(task)
        check_task(self.task, self.router.tasks)
        found = self.router.model.device
        if device not in (None, HARNESS_DEFAULT, found.type, str(found)):
            raise ValueError(f"device={device!r}: the base is loaded on {found}; leave it out")
        self.answered: Counter[str] = Counter()
        """How many requests each task has answered."""
        self._turns: dict[str, list[dict[str, str]]] = {}
        module = self.router.model.module
        super().__init__(pretrained=module, tokenizer=self.router.tokenizer, batch_size=batch_size, **options)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness's."""
        call = super().loglikelihood
        return self._by_task(requests, lambda some: call(some, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As the harness's."""
        call = super().loglikelihood_rolling
        return self._by_task(requests, lambda some: call(some, disable_tqdm=disable_tqdm))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As the harness's."""
        call = super().generate_until
        return self._by_task(requests, lambda some: call(some, disable_tqdm=disable_tqdm))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """As the harness's; the turns behind the text are kept, for the retrieval."""
        text = str(super().apply_chat_template(chat_history, add_generation_prompt))
        self._turns[text] = chat_history
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results about the model."""
        bank = self.router.bank
        about = {"bank": str(bank.folder), "generation": bank.generation, "base": bank.base}
        return super().get_model_info() | about | {"task": self.task, "answered": dict(self.answered)}

    def _by_task(
        self, requests: Sequence[Instance], call: Callable[[list[Instance]], list[Any]]
    ) -> list[Any]:
        """What ``call`` makes of the requests, each with the delta of its task, in their order."""
        held = self._held([request.args[0] for request in requests])
        found: list[Any] = [None] * len(requests)
        for task, shares in dict.fromkeys(held):
            places = [place for place, each in enumerate(held) if each == (task, shares)]
            with self.router.holding(task, shares):
                results = call([requests[place] for place in places])
            for place, result in zip(places, results, strict=True):
                found[place] = result
        counts = Counter(task for task, _ in held)
        logger.info("answered by %s", ", ".join(f"{task}: {number}" for task, number in counts.most_common()))
        self.answered += counts
        return found

    def _held(self, contexts: Sequence[str]) -> list[tuple[str, Shares]]:
        """Who answers each context, as ``Router.holding`` takes it; one that is asked for again is represented once."""
        if self.task != AUTO:
            return [(self.task, ())] * len(contexts)
        known: dict[str, tuple[str, Shares]] = {"": (BASE, ())}
        new = [text for text in dict.fromkeys(contexts) if text not in known]
        encoded = self.router.encode([self._prompt(text) for text in new])
        # As the harness cuts what is too long.
        ids = [each[-self.max_length :] for each in encoded]
        routes = self.router.routes(ids, [None] * len(new))
        known |= {text: (route.task, route.shares) for text, route in zip(new, routes, strict=True)}
        return [known[text] for text in contexts]

    def _prompt(self, text: str) -> Prompt:
        """The conversation that a text was made of, without the beginning of its answer; else the text."""
        turns = list(self._turns.get(text, ()))
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        return turns or text
