"""Retrieval by each task's own representation: against a copy of the model for each task, and what an older bank says."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from bank.samples import adapted_bank, base_model, prompts_of, represent_rows, same_bits, small_delta
from torch import Tensor

from trace_dist import DeltaBank
from trace_dist.bank.adapted import retrieve_adapted
from trace_dist.bank.delta import applied
from trace_dist.bank.density import Mixture
from trace_dist.bank.rejection import threshold
from trace_dist.bank.representation import represent
from trace_dist.bank.signature import fit_signature
from trace_dist.bank.verify import verify
from trace_dist.run_folder import ADAPTED
from trace_dist.utils.names import BASE

NUM_TASKS = 3


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> DeltaBank:
    """To be left as it is."""
    return adapted_bank(tmp_path_factory.mktemp("adapted") / "bank", base_model(), NUM_TASKS)


def fresh() -> list[list[int]]:
    return [prompt for task in range(NUM_TASKS) for prompt in prompts_of(task, 6, seed=50)]


def by_hand(bank: DeltaBank, prompts: list[list[int]], candidates: int) -> tuple[list[str], Tensor]:
    """Every task tried on a copy of the base that holds its delta; then the candidates picked out."""
    densities = []
    for task in bank.tasks:
        model = base_model()
        with applied(model, bank.delta(task)):
            module = copy.deepcopy(model.module)
        x = represent(module, prompts, layer=1, batch_size=8, pad_id=0)
        densities.append(Mixture.of(bank.adapted(task)).log_density(x))
    table = torch.stack(densities, dim=1)
    base = represent(base_model().module, prompts, layer=1, batch_size=8, pad_id=0)
    tried = bank.retriever.scores(base).topk(candidates, dim=1).indices
    allowed = torch.full_like(table, -torch.inf).scatter(1, tried, 0.0)
    return [bank.tasks[index] for index in (table + allowed).argmax(dim=1).tolist()], table


@pytest.mark.parametrize("candidates", [1, 2, NUM_TASKS])
def test_the_most_likely_candidate_wins(bank: DeltaBank, candidates: int) -> None:
    model, prompts = base_model(), fresh()
    before = model.full_state_dict()
    base = represent(model.module, prompts, layer=1, batch_size=8, pad_id=0)
    asked: list[int] = []

    def rows(chosen: list[int]) -> Tensor:
        asked.extend(chosen)
        return represent_rows(model, prompts)(chosen)

    found = retrieve_adapted(bank, model, base, rows, candidates=candidates)
    expected, _ = by_hand(bank, prompts, candidates)
    assert found == expected
    # What a prompt costs is its candidates, not the tasks.
    assert len(asked) == candidates * len(prompts)
    if candidates == 1:
        assert found == bank.retrieve(base)
    assert same_bits(model.full_state_dict(), before, "float32")


def test_what_is_atypical_under_the_tasks_own_weights_goes_to_the_base(bank: DeltaBank) -> None:
    model, prompts = base_model(), [[44] * 9, [45, 46], *fresh()]
    base = represent(model.module, prompts, layer=1, batch_size=8, pad_id=0)
    found = retrieve_adapted(
        bank, model, base, represent_rows(model, prompts), candidates=NUM_TASKS, reject=0.25
    )
    kept, table = by_hand(bank, prompts, NUM_TASKS)
    least = {task: threshold(bank.adapted(task), 0.25) for task in bank.tasks}
    expected = [
        task if density >= least[task] else BASE
        for task, density in zip(kept, table.amax(dim=1), strict=True)
    ]
    assert found == expected
    assert 0 < found.count(BASE) < len(prompts)


def test_it_lies_beside_the_signature(bank: DeltaBank, tmp_path: Path) -> None:
    shutil.copytree(bank.folder, tmp_path / "copy")
    bank = DeltaBank(tmp_path / "copy")
    assert verify(bank) == []
    folders = [record.folder for record in bank.index.records]
    assert all((bank.files.task(folder) / ADAPTED).is_file() for folder in folders)
    bank.rename("t0", "zero")
    assert bank.adapted("zero").task == "zero"
    (bank.files.task(folders[1]) / ADAPTED).write_bytes(b"")
    assert any(ADAPTED in problem for problem in verify(bank))


def test_an_older_bank_names_the_tasks_and_the_cure(tmp_path: Path) -> None:
    model = base_model()
    bank = adapted_bank(tmp_path, model, 2)
    x = torch.randn(20, bank.signature("t0").dim)
    bank.add(fit_signature(x, 1, 0, "old"), small_delta("old", 1))
    message = r"no signature of old under its own weights; set bank\.representation: base, or remove these tasks and learn"
    with pytest.raises(ValueError, match=message):
        bank.check_adapted()
    with pytest.raises(ValueError, match=message):
        retrieve_adapted(bank, model, x, represent_rows(model, []), candidates=2)
    assert len(bank.retrieve(x)) == 20
