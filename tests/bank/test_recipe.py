"""Tasks that are kept as recipes over earlier ones: the same bits as whole ones, through all that a bank can do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bank.samples import base_model, drawn, make_delta, same_delta

from trace_dist import Delta, DeltaBank, Mask
from trace_dist.bank.changes import Task
from trace_dist.bank.delta import applied, extract_delta
from trace_dist.bank.export import export
from trace_dist.bank.folder import read_task
from trace_dist.bank.merge import merge
from trace_dist.bank.recipe import GROUPS, Part, Recipe
from trace_dist.bank.verify import verify
from trace_dist.cli.main import main
from trace_dist.models.fingerprint import fingerprint
from trace_dist.serving.cache import DeltaCache
from trace_dist.sharding import ShardedModel
from trace_dist.sharding.build import load_sharded
from trace_dist.train.combination import CombinationLearner

SCALARS = {"attention": 0.75, "mlp": 0.0, "other": -0.3}


@pytest.fixture(scope="module")
def model() -> ShardedModel:
    return base_model()


def part(bank: DeltaBank, task: str, **scalars: float) -> Part:
    record = bank.index.get(task)
    assert record is not None
    delta, recipe = record.key
    assert delta is not None
    return Part(delta, SCALARS | scalars, recipe)


def own_part(model: ShardedModel, bank: DeltaBank, task: str, seed: int) -> Delta:
    """Values at entries that no task of the bank has."""
    whole = make_delta(model, task, seed)
    mask = whole.mask
    for other in bank.tasks:
        mask = (mask - bank.mask(other)).with_meta(task=task)
    values = {
        name: whole.values[name][torch.isin(whole.mask.elements(name), mask.elements(name))] for name in mask
    }
    return Delta(mask, values, task)


@pytest.fixture
def bank(tmp_path: Path, model: ShardedModel) -> DeltaBank:
    """a and b whole, c over both, d over a and c."""
    bank = DeltaBank.create(tmp_path / "bank", "aaaa", 1)
    for seed, task in enumerate("ab"):
        bank.add(drawn(task, seed), make_delta(model, task, seed))
    recipe = Recipe((part(bank, "a"), part(bank, "b", other=0.5)))
    bank.add(drawn("c", 2), own_part(model, bank, "c", 2), recipe=recipe)
    nested = Recipe((part(bank, "c", attention=1.0), part(bank, "a", mlp=0.25)))
    bank.add(drawn("d", 3), own_part(model, bank, "d", 3), recipe=nested)
    return bank


def whole(bank: DeltaBank, task: str, model: ShardedModel) -> Delta:
    found = bank.delta_on(task, model)
    assert found is not None
    return found


def changed(mask: Mask) -> Mask:
    """What a part of c takes of it: its share of the MLPs is 0."""
    units = {name: mask.units[name] for name in mask if "mlp" not in name}
    assert 0 < len(units) < len(mask)
    return Mask(units, mask.layouts, mask.granularity, mask.meta)


def test_it_holds_the_bits_of_the_combination_that_was_fitted(bank: DeltaBank, model: ShardedModel) -> None:
    before = model.full_state_dict()
    delta, own = whole(bank, "c", model), bank.own_delta("c")
    assert own is not None
    assert delta.mask == own.mask | changed(bank.mask("a")) | changed(bank.mask("b"))
    assert delta.mask == bank.mask("c")
    deltas = [whole(bank, task, model) for task in "ab"]
    learner = CombinationLearner(model, deltas, lr=1.0)
    scalars = [[found.scalars[group] for group in GROUPS] for found in _parts(bank, "c")]
    learner.set(torch.tensor(scalars, dtype=torch.float64))
    model.detach()
    with applied(model, own):
        expected = extract_delta(model, delta.mask, "c")
    learner.restore()
    assert same_delta(delta, expected)
    after = model.full_state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with bank.activated(model, "c"):
        assert same_delta(extract_delta(model, delta.mask, "c"), delta)


def _parts(bank: DeltaBank, task: str) -> tuple[Part, ...]:
    recipe = bank.recipe(task)
    assert recipe is not None
    return recipe.parts


def test_recipes_may_be_made_of_recipes(bank: DeltaBank, model: ShardedModel) -> None:
    delta, own = whole(bank, "d", model), bank.own_delta("d")
    assert own is not None
    assert bank.needs("d") == ["c", "a"]
    assert delta.mask == own.mask | changed(bank.mask("c")) | bank.mask("a")
    name = next(name for name in delta.mask if "q_proj" in name)
    base = extract_delta(model, delta.mask, "d").values[name].double()
    change = torch.zeros_like(base)
    for task, share in (("c", 1.0), ("a", SCALARS["attention"])):
        theirs = whole(bank, task, model)
        places = torch.searchsorted(delta.mask.elements(name), theirs.mask.elements(name))
        change[places] += share * (theirs.values[name].double() - base[places])
    expected = base + change
    mine = torch.searchsorted(delta.mask.elements(name), own.mask.elements(name))
    expected[mine] = own.values[name].double()
    torch.testing.assert_close(delta.values[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_it_is_some_hundred_bytes_beside_its_own_part(bank: DeltaBank, model: ShardedModel) -> None:
    own = bank.own_delta("c")
    assert own is not None
    all_of_both = Recipe((part(bank, "a", mlp=0.5), part(bank, "b", mlp=0.25)))
    bank.add(drawn("e", 4), replace(own, task="e"), recipe=all_of_both)
    folder = bank.files.task("e")
    size = (folder / "recipe.json").stat().st_size
    assert size < 600
    assert bank.delta_bytes("e") == size + (folder / "delta.safetensors").stat().st_size
    whole(bank, "e", model).save(folder.parent / "whole.safetensors")
    assert bank.delta_bytes("e") < 0.5 * (folder.parent / "whole.safetensors").stat().st_size  # type: ignore[operator]


def test_its_own_part_may_be_where_nothing_is_taken(bank: DeltaBank, model: ShardedModel) -> None:
    recipe = Recipe((part(bank, "a", attention=0.0, other=0.0, mlp=0.0), part(bank, "b", attention=0.0)))
    mine = whole(bank, "a", model)
    names = [name for name in mine.mask if "mlp" in name]
    units = {name: mine.mask.units[name] for name in names}
    mask = Mask(units, mine.mask.layouts, mine.mask.granularity, mine.mask.meta)
    own = Delta(mask, {name: mine.values[name] for name in names}, "e")
    bank.add(drawn("e", 4), own, recipe=recipe)
    assert verify(bank) == []
    delta = whole(bank, "e", model)
    assert delta.mask == bank.mask("e")
    assert all(torch.equal(delta.values[name], own.values[name]) for name in names)
    assert set(delta.mask) > set(names)
    assert not any("self_attn" in name for name in delta.mask)
    nothing = Recipe((part(bank, "a", **dict.fromkeys(GROUPS, 0.0)),))
    bank.add(drawn("f", 5), replace(own, task="f"), recipe=nothing)
    assert same_delta(whole(bank, "f", model), own)
    assert bank.mask("f") == own.mask


def test_it_survives_a_rename_and_keeps_what_it_needs(bank: DeltaBank, model: ShardedModel) -> None:
    before = {task: whole(bank, task, model) for task in "cd"}
    bank.rename("a", "first")
    assert bank.needs("c") == ["first", "b"]
    assert all(same_delta(whole(bank, task, model), before[task]) for task in "cd")
    for task, needing in (("first", "c, d are kept as a recipe"), ("c", "d is kept as a recipe")):
        with pytest.raises(ValueError, match=rf"^task='{task}': {needing} that needs it; remove th"):
            bank.remove(task)
    assert verify(bank) == []
    for task in ("d", "c", "first"):
        bank.remove(task)
    assert bank.tasks == ["b"]


def test_who_cannot_complete_it_is_told(bank: DeltaBank) -> None:
    with pytest.raises(
        ValueError, match=r"^task='c': is kept as a recipe over a, b, which .* DeltaBank.delta_on\("
    ):
        bank.delta("c")


def test_it_goes_into_another_bank_where_its_parts_are(
    bank: DeltaBank, model: ShardedModel, tmp_path: Path
) -> None:
    other = DeltaBank.create(tmp_path / "other", "aaaa", 1)

    def add(task: Task) -> None:
        other.add(task.signature, task.delta, facts=task.facts, recipe=task.recipe)

    add(read_task(bank.files.task("b"), other))
    with pytest.raises(
        ValueError, match=r"^task='c': is a recipe over 2 earlier tasks, and the bank .* not hold 1 of them"
    ):
        add(read_task(bank.files.task("c"), other))
    for task in "ac":
        add(read_task(bank.files.task(task), other))
    alone = tmp_path / "alone"
    shutil.copytree(bank.files.task("d"), alone)
    add(read_task(alone, other))
    assert verify(other) == []
    assert all(same_delta(whole(other, task, model), whole(bank, task, model)) for task in "abcd")
    # Already there, the very same; and merged, where parts lie in either bank.
    generation = other.generation
    add(read_task(bank.files.task("c"), other))
    assert other.generation == generation
    for task in "dc":
        other.remove(task)
    merged = merge(other, bank, tmp_path / "merged")
    assert sorted(merged.tasks) == list("abcd")
    assert verify(merged) == []
    assert same_delta(whole(merged, "d", model), whole(bank, "d", model))


def test_it_is_exported_whole(bank: DeltaBank, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = base_model()
    model.module.save_pretrained(tmp_path / "base")
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    plain.save_pretrained(tmp_path / "base")
    named = DeltaBank.create(tmp_path / "named", fingerprint(tmp_path / "base"), 1)
    for task in "abc":
        delta = bank.own_delta(task)
        assert delta is not None
        named.add(bank.signature(task), delta, recipe=bank.recipe(task))
    export(named, ["c"], tmp_path / "out", str(tmp_path / "base"))
    exported = load_sharded(str(tmp_path / "out"), "float32", "single")
    expected = whole(named, "c", model)
    assert same_delta(extract_delta(exported, expected.mask, "c"), expected)


def test_the_cache_of_a_server_tells_recipes_apart(bank: DeltaBank, model: ShardedModel) -> None:
    cache = DeltaCache(bank, model, 2**30)
    swap = cache.get("c")
    assert swap is not None
    assert cache.get("c") is swap
    with swap.applied():
        held = extract_delta(model, bank.mask("c"), "c")
    assert same_delta(held, whole(bank, "c", model))


def test_verify_finds_what_a_recipe_lacks(bank: DeltaBank, model: ShardedModel) -> None:
    index = bank.index
    replace(index, records=tuple(each for each in index.records if each.name != "a")).save(bank.files.index)
    problems = verify(DeltaBank(bank.folder))
    assert len(problems) == 2
    assert all("does not hold 1 of them as they were" in problem for problem in problems)


def test_the_recipe_of_another_task_is_refused(bank: DeltaBank, model: ShardedModel) -> None:
    """Whole, but not the one that was written: its values would be others."""
    mine, other = (bank.files.task(task) / "recipe.json" for task in ("c", "d"))
    mine.write_bytes(other.read_bytes())
    for read in (bank.recipe, bank.needs, bank.mask, lambda task: bank.delta_on(task, model)):
        with pytest.raises(ValueError, match=r"recipe\.json: damaged recipe \(its bytes are not those"):
            read("c")


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_a_task_whose_recipe_is_lost_can_be_removed(
    damage: Callable[[Path], None], bank: DeltaBank, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is no copy; what another damaged recipe may need stays."""
    damage(bank.files.task("d") / "recipe.json")
    with pytest.raises(ValueError, match=r"d/recipe\.json"):
        bank.remove("a")
    assert main(["bank", "show", str(bank.folder)]) == 0
    shown = [line.split("│")[-2].strip() for line in capsys.readouterr().out.splitlines() if line[:1] == "│"]
    assert shown == ["-", "-", "a, b", "damaged"]
    bank.remove("d")
    assert verify(bank) == []
    assert bank.tasks == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is no recipe of a task"),
        ({"version": 2}, "version 2, but this release reads 1; update trace_dist"),
        ({"parts": []}, "it names no task"),
        ({"parts": [{"delta": "x", "scalars": {"attention": 1.0}}]}, "a task of it is"),
        ({"parts": [{"delta": "x", "scalars": dict.fromkeys(GROUPS, "1")}]}, "a task of it is"),
        ({"parts": [{"delta": "x", "scalars": dict.fromkeys(GROUPS, 10**400)}]}, "a task of it is"),
        ({"parts": [{"delta": 3, "scalars": dict.fromkeys(GROUPS, 1.0)}]}, "a task of it is"),
    ],
)
def test_a_damaged_recipe_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    from trace_dist.utils.sealed import write_record

    path = tmp_path / "recipe.json"
    recipe = Recipe((Part("abc", SCALARS), Part("def", SCALARS, "ghi")))
    recipe.save(path)
    assert Recipe.load(path) == recipe
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | change))
    with pytest.raises(ValueError, match="wrong checksum"):
        Recipe.load(path)
    del value["checksum"]
    write_record(path, value | change)
    with pytest.raises(ValueError, match=message):
        Recipe.load(path)


def test_an_own_part_that_meets_its_recipe_is_refused(bank: DeltaBank, model: ShardedModel) -> None:
    recipe = Recipe((part(bank, "a"),))
    bank.add(drawn("e", 4), make_delta(model, "e", 4), recipe=recipe)
    with pytest.raises(ValueError, match=r"^delta 'e': its own part shares entries with its recipe's"):
        bank.delta_on("e", model)
    assert [problem for problem in verify(bank) if "shares entries with the tasks of its recipe" in problem]
