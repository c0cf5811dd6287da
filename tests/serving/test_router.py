"""The router: its answers are those of the tasks' merged checkpoints, and the base is itself again, whatever happens."""

from __future__ import annotations

import errno
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.small import CAP, MORE, TASKS, Small, prompts

from trace_dist import DeltaBank, Mask, Router, load_sharded
from trace_dist.bank.bank import BASE
from trace_dist.bank.bound import error_bound
from trace_dist.bank.delta import applied, extract_delta
from trace_dist.evaluation import greedy_decode
from trace_dist.models.fingerprint import fingerprint
from trace_dist.run_folder import SIGNATURE
from trace_dist.serving import router as routers
from trace_dist.serving.cache import DeltaCache
from trace_dist.serving.options import Sampling
from trace_dist.serving.row import Row
from trace_dist.serving.stream import Pieces, Stream
from trace_dist.utils import dist

ASKED = [(task, text) for task in (*TASKS[:3], BASE) for text in prompts(task, 2, seed=1)]
pytestmark = pytest.mark.usefixtures("base_is_kept")
SHORT = Sampling(max_new_tokens=CAP)


@pytest.fixture(scope="module")
def router(small: Small) -> Router:
    return Router.open(small.bank, small.base)


def expected(small: Small) -> list[str]:
    return [small.expected(task, [text])[0] for task, text in ASKED]


def test_answers_are_those_of_the_merged_checkpoints(router: Router, small: Small) -> None:
    texts = [text for _, text in ASKED]
    wanted = expected(small)
    # The same prompts get other answers from other tasks.
    assert len({tuple(small.expected(task, texts[:2])) for task in (*TASKS, BASE)}) == len(TASKS) + 1
    retrieved = router.ask(texts, sampling=SHORT)
    named = router.ask(texts, [task for task, _ in ASKED], SHORT)
    assert [answer.text for answer in retrieved] == [answer.text for answer in named] == wanted
    assert [answer.task for answer in retrieved] == [task for task, _ in ASKED]
    assert all(answer.margin is None for answer in named)


def test_every_answer_says_how_sure_it_is(router: Router) -> None:
    bank = DeltaBank(router.bank.folder)
    bound = error_bound(bank.retriever)
    limits = dict(zip(bound.tasks, bound.heldout_limit, strict=True))
    for (_, text), answer in zip(ASKED, router.ask([text for _, text in ASKED], sampling=SHORT), strict=True):
        assert answer.margin is not None
        assert answer.margin > 0
        assert answer.error_bound == limits[answer.task] < 1
        assert not answer.rejected
        assert answer.num_prompt_tokens == len(router.encode([text])[0])


def test_a_conversation_of_one_turn_is_a_text(router: Router) -> None:
    turns = [[{"role": "user", "content": text}] for _, text in ASKED]
    assert router.ask(turns, sampling=SHORT) == router.ask([text for _, text in ASKED], sampling=SHORT)
    longer = [{"role": "user", "content": "copy ab"}, {"role": "assistant", "content": "ab"}, *turns[0]]
    ids = router.tokenizer.apply_chat_template(longer, add_generation_prompt=True, return_dict=False)
    assert router.encode([longer]) == [list(ids)]


def test_each_answer_ends_by_itself(router: Router) -> None:
    """Stop texts cut an answer before them, wherever tokens end; the others of the batch go on."""
    texts = [text for _, text in ASKED]
    whole = [answer.text for answer in router.ask(texts, sampling=SHORT)]
    stop = [next(text for text in whole if len(text) > 4)[2:4], "never written"]
    cut = router.ask(texts, sampling=Sampling(max_new_tokens=CAP, stop=stop))
    assert [answer.text for answer in cut] == [text.partition(stop[0])[0] for text in whole]
    assert {answer.finish for answer in cut} == {"stop", "length"}
    assert len({answer.num_tokens for answer in cut}) > 1


def test_text_comes_as_it_is_written(router: Router) -> None:
    texts = [text for _, text in ASKED]
    pieces: dict[int, list[str]] = {number: [] for number in range(len(texts))}
    stop = [router.ask(texts[:1], sampling=SHORT)[0].text[3:5]]
    for sampling in (SHORT, Sampling(max_new_tokens=CAP, stop=stop)):
        for found in pieces.values():
            found.clear()
        answers = router.ask(
            texts, sampling=sampling, on_text=lambda number, piece: pieces[number].append(piece)
        )
        assert ["".join(found) for found in pieces.values()] == [answer.text for answer in answers]
    stream = router.stream(texts[0], sampling=SHORT)
    found = list(stream)
    assert len(found) > 1
    assert "".join(found) == stream.answer.text == router.ask(texts[:1], sampling=SHORT)[0].text


def test_on_a_4_bit_base(small: Small) -> None:
    """As the model of the same codes decodes with the delta in it."""
    pytest.importorskip("bitsandbytes")
    router = Router.open(small.bank, small.base, quantize="nf4")
    texts = [text for task, text in ASKED if task == "copy"]
    answers = router.ask(texts, ["copy"] * 2, SHORT)
    model = load_sharded(str(small.base), "float32", quantize="nf4")
    with applied(model, router.bank.delta("copy")):
        ids = greedy_decode(
            model.module, router.tokenizer, router.encode(texts), batch_size=2, max_new_tokens=CAP
        )
    assert [answer.text for answer in answers] == router.tokenizer.batch_decode(ids)
    assert [answer.text for answer in answers] != small.expected("copy", texts)
    assert router.holds_base()


def test_a_bank_that_was_learned_on_a_4_bit_base_gets_one(small: Small, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_sharded(str(small.base), "float32", quantize="nf4")
    delta = extract_delta(model, Mask.random(model, 0.05), "copy")
    before = DeltaBank(small.bank)
    bank = DeltaBank.create(tmp_path / "bank", before.base, before.layer)
    bank.add(before.signature("copy"), delta)
    assert Router.open(bank.folder, small.base).model.quantize == "nf4"
    assert Router.open(bank.folder, small.base, quantize="none").model.quantize == "none"


def test_who_stops_reading_stops_the_writing(router: Router) -> None:
    stream = router.stream(ASKED[0][1])
    for _ in stream:
        break
    stream.close()
    assert stream.answer.finish in ("cancelled", "stop")
    assert router.holds_base()


def test_a_stream_writes_on_the_device_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA keeps a device for each thread: without a word, a new one's is the first."""
    taken: list[tuple[str, int]] = []
    name = threading.current_thread().name
    monkeypatch.setattr(dist, "local_device", lambda: torch.device("cuda", 3))
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: taken.append((threading.current_thread().name, device.index))
    )
    row = Row([1], 1, [], [], str)
    stream = Stream(row, Pieces(), lambda: taken.append((threading.current_thread().name, -1)), lambda: row)
    assert list(stream) == []
    assert [number for _, number in taken] == [3, -1]
    assert name not in {thread for thread, _ in taken}


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 9e-5])
def test_the_coldest_draw_takes_the_likeliest_token(router: Router, temperature: float) -> None:
    """Logits divided by such a number are infinite."""
    texts = [text for _, text in ASKED]
    answers = router.ask(texts, sampling=Sampling(max_new_tokens=CAP, temperature=temperature))
    assert answers == router.ask(texts, sampling=SHORT)


def test_a_change_while_the_base_is_loaded_is_seen(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small.bank, tmp_path / "bank")
    load = routers.load_sharded

    def meanwhile(*options: Any) -> Any:
        DeltaBank(tmp_path / "bank").rename("copy", "renamed")
        return load(*options)

    monkeypatch.setattr(routers, "load_sharded", meanwhile)
    router = Router.open(tmp_path / "bank", small.base)
    assert router.refresh()
    assert not router.refresh()
    (answer,) = router.ask([ASKED[0][1]], ["renamed"], SHORT)
    assert answer.text == expected(small)[0]


def test_draws_follow_their_seed(router: Router) -> None:
    texts = [text for _, text in ASKED]

    def drawn(seed: int) -> list[str]:
        sampling = Sampling(max_new_tokens=CAP, temperature=1.0, top_p=0.9, top_k=20, seed=seed)
        return [answer.text for answer in router.ask(texts, sampling=sampling)]

    before = torch.random.get_rng_state()
    one = drawn(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert one == drawn(1) != drawn(2)


def test_a_base_with_defaults_of_its_own_answers_as_asked(small: Small, tmp_path: Path) -> None:
    """Temperature and penalties in a checkpoint's generation_config.json do not change what a request says."""
    base = shutil.copytree(small.base, tmp_path / "base")
    (base / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 5.0, "repetition_penalty": 9.0, "max_length": 3}'
    )
    answers = Router.open(small.bank, base).ask([text for _, text in ASKED], sampling=SHORT)
    assert [answer.text for answer in answers] == expected(small)


class Broken(RuntimeError):
    """Out of memory, say."""


def test_the_base_is_back_after_a_failure(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    forward = router.model.module.forward

    def fails(*args: Any, **kwargs: Any) -> Any:
        seen.append(fingerprint(router.model.module))
        if len(seen) == 3:
            raise Broken
        return forward(*args, **kwargs)

    monkeypatch.setattr(router.model.module, "forward", fails)
    with pytest.raises(Broken):
        router.ask(["copy abcd"], ["copy"], SHORT)
    assert set(seen) != {router.fingerprint}
    assert fingerprint(router.model.module) == router.fingerprint
    seen.clear()
    with pytest.raises(Broken):
        list(router.stream("copy abcd", "copy", SHORT))


def test_a_task_that_is_added_is_seen(small: Small, tmp_path: Path) -> None:
    folder = shutil.copytree(small.bank, tmp_path / "bank")
    router, writer = Router.open(folder, small.base, cache_gib=0), DeltaBank(folder)
    later = prompts("later", 2, seed=1)
    assert not router.refresh()
    assert {answer.task for answer in router.ask(later, sampling=SHORT)} != {"later"}
    writer.add(*small.parts("later"))
    assert router.refresh()
    assert [(a.task, a.text) for a in router.ask(later, sampling=SHORT)] == [
        ("later", text) for text in small.expected("later", later)
    ]
    writer.remove("copy")
    # Without a refresh: what is not there any more is noticed, and what is there otherwise is read anew.
    with pytest.raises(ValueError, match=r"task='copy': the bank does not hold it; it holds base, twist"):
        router.ask(["copy abcd"], ["copy"], SHORT)
    writer.remove("plain")
    signature, delta = small.parts("later")
    assert delta is not None
    writer.add(
        replace(signature, task="plain"),
        replace(delta, task="plain", mask=delta.mask.with_meta(task="plain")),
    )
    assert router.ask(later, ["plain"] * 2, SHORT)[0].text == small.expected("later", later)[0]
    (folder / "bank.json").rename(folder / "gone")
    with pytest.raises(ValueError, match="cannot be read"):
        router.refresh()
    assert router.ask(later, sampling=SHORT)[0].task == "later"


def test_a_task_that_is_damaged_leaves_the_others_as_they_are(small: Small, tmp_path: Path) -> None:
    folder = shutil.copytree(small.bank, tmp_path / "bank")
    router, writer = Router.open(folder, small.base), DeltaBank(folder)
    asked = prompts("copy", 2, seed=1)
    before = router.ask(asked, sampling=SHORT)
    writer.add(*small.parts("later"))
    record = writer.index.get("later")
    assert record is not None
    file = writer.files.task(record.folder) / SIGNATURE
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="signature"):
        router.refresh()
    assert "later" not in router.tasks
    assert not router.refresh()
    assert router.ask(asked, sampling=SHORT) == before
    writer.remove("later")
    assert router.refresh()
    assert router.ask(asked, sampling=SHORT) == before


def test_another_bank_in_the_place_of_the_one_that_is_served(small: Small, tmp_path: Path) -> None:
    """Of the same generation, so nothing seemed to have changed; one of another base was answered from."""
    folder = shutil.copytree(small.bank, tmp_path / "bank")
    router, old = Router.open(folder, small.base), DeltaBank(folder)
    for place, base in (("same", old.base), ("other", "f" * 64)):
        new = DeltaBank.create(tmp_path / place, base, old.layer)
        for task in ("later", BASE, *MORE)[: old.generation]:
            given, delta = small.parts(task)
            kept = None if delta is None else replace(delta, mask=delta.mask.with_meta(model=base))
            new.add(given, kept)
        assert new.generation == old.generation
        shutil.rmtree(folder)
        (tmp_path / place).rename(folder)
        if place == "same":
            assert router.refresh()
        else:
            with pytest.raises(ValueError, match=r"bank .*: made for the model with fingerprint ffff"):
                router.refresh()
        assert router.tasks == [BASE, "later", *MORE[: old.generation - 2]]
        [answer] = router.ask(prompts("later", 1, seed=1), sampling=SHORT)
        assert answer.task == "later"
        assert answer.error_bound is not None


def test_a_task_that_may_not_be_read_leaves_the_others_as_they_are(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of somebody whose files are for nobody else; every prompt without a task's name failed."""
    folder = shutil.copytree(small.bank, tmp_path / "bank")
    router, writer = Router.open(folder, small.base), DeltaBank(folder)
    asked = prompts("copy", 2, seed=1)
    before = router.ask(asked, sampling=SHORT)
    writer.add(*small.parts("later"))
    closed, opened = writer.path("later").parent, Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.parent == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"the signature file cannot be read \(Permission denied\)"):
        router.refresh()
    assert "later" not in router.tasks
    assert router.ask(asked, sampling=SHORT) == before


def test_a_damaged_task_beside_one_that_was_removed(small: Small, tmp_path: Path) -> None:
    """What was seen before is answered from what is in memory; the files of the task that is gone cannot be read again."""
    folder = shutil.copytree(small.bank, tmp_path / "bank")
    router, writer = Router.open(folder, small.base), DeltaBank(folder)
    asked = prompts("copy", 2, seed=1)
    before = router.ask(asked, sampling=SHORT)
    writer.remove("plain")
    writer.add(*small.parts("later"))
    file = writer.path("later").with_name(SIGNATURE)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="signature"):
        router.refresh()
    assert "plain" in router.tasks
    assert router.ask(asked, sampling=SHORT) == before
    writer.remove("later")
    assert router.refresh()
    assert router.tasks == [BASE, "copy", "twist"]
    assert {answer.task for answer in router.ask(asked, sampling=SHORT)} == {"copy"}


def test_deltas_are_kept_in_memory_as_far_as_there_is_room(router: Router) -> None:
    bank, model = router.bank, router.model
    one = DeltaCache(bank, model, 0).get("copy")
    assert one is not None
    delta = bank.delta("copy")
    assert delta is not None
    # Values, and four bytes for each masked unit.
    assert one.nbytes == 4 * sum(map(len, delta.values.values())) + 4 * sum(
        map(len, delta.mask.units.values())
    )
    whole = DeltaCache(bank, model, 2 * one.nbytes)
    swap = whole.get("copy")
    assert swap is not None
    # With the base's values at the same entries, as there is room for both.
    assert swap.keeps_own
    assert one.nbytes < whole.num_bytes == swap.nbytes < 2 * one.nbytes
    cache = DeltaCache(bank, model, 2.5 * one.nbytes)
    found = {task: cache.get(task) for task in TASKS[:2]}
    # Those go first, the oldest delta's before the others'.
    assert [swap is not None and swap.keeps_own for swap in found.values()] == [False, True]
    assert cache.get(BASE) is None
    assert all(cache.get(task) is swap for task, swap in found.items())
    cache.get("plain")  # pushes out what was used longest ago
    assert cache.get("twist") is found["twist"]
    assert cache.get("copy") is not found["copy"]
    assert cache.num_bytes == 2 * one.nbytes
    small = DeltaCache(bank, model, one.nbytes / 2)
    assert small.get("copy") is not small.get("copy")
    assert small.num_bytes == 0


def test_one_task_is_held_at_a_time(router: Router) -> None:
    """Within another one's weights nothing is retrieved or written, since that would be by the wrong ones."""
    with router.holding(BASE), router.holding("copy"):
        for work in (
            lambda: router.ask(["twist abcd"], ["twist"], SHORT),
            lambda: router.ask(["twist abcd"], [BASE], SHORT),
            lambda: router.ask(["twist abcd"], sampling=SHORT),
        ):
            with pytest.raises(
                ValueError, match="the model holds task 'copy' here; ask outside of the block"
            ):
                work()
    # A stream's thread would wait for the block to end, and the block for its pieces.
    with router.holding(BASE), pytest.raises(ValueError, match="the model holds a task here; ask outside"):
        router.stream("copy abcd", BASE, SHORT)
    assert router.ask(["copy abcd"], ["copy"], SHORT)[0].task == "copy"


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"reject": 1.0}, r"reject=1.0: must lie in \(0, 1\)"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"dtype": "bfloat16"}, "holds torch.float32, the model torch.bfloat16"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], fragment: str, small: Small) -> None:
    with pytest.raises(ValueError, match=fragment):
        Router.open(small.bank, small.base, **options).ask(["copy abcd"], ["copy"], SHORT)


@pytest.mark.parametrize(
    ("prompt", "fragment"),
    [
        (7, "prompt 0: must be a text or a list of turns, not 7"),
        ([], r"prompt 0: must be a text or a list of turns, not \[\]"),
        ("half \ud83d", "prompt 0: .* holds half of a character"),
        ([{"role": "user"}], "prompt 0: turn 1: .* must be an object of `role` and `content`"),
        ([{"role": "user", "content": None}], "prompt 0: turn 1: content=None: must be a text"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "ends with an assistant's turn",
        ),
        ([{"role": "judge", "content": "a"}], "roles are user and assistant"),
        ("copy " + "a" * 300, "prompt 0: .* do not fit the model's 256 positions"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: Any, fragment: str, router: Router) -> None:
    with pytest.raises(ValueError, match=fragment):
        router.ask([prompt])


def test_another_base_is_refused_before_it_is_loaded(small: Small) -> None:
    with pytest.raises(ValueError, match="made for the model with fingerprint"):
        Router.open(small.bank, small.folder / "copy")
    with pytest.raises(ValueError, match="2 names for 1 prompts"):
        Router.ask(Router.open(small.bank, small.base), ["a"], ["copy", "copy"])
    assert Router.open(small.bank, small.base).ask([]) == []
