"""transformers.Trainer with the recorder's callback: the same training, and all of it on the record."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from recorder.errors import JoinError, UsageError
from recorder.recording import RecorderWarning, Recording
from recorder.runformat import Run
from replay.selfcheck import check_update
from tests.external.whole_way import go_the_whole_way

os.environ["HF_HUB_OFFLINE"] = "1"
transformers: Any = pytest.importorskip("transformers")
accelerate: Any = pytest.importorskip("accelerate")

from recorder.integrations.hf_callback import SKIPPED, RecorderCallback  # noqa: E402
from recorder.integrations.hf_workload import TrainerWorkload  # noqa: E402
from tests.external.hf_models import EXAMPLES, Numbers, bert, gpt2, t5  # noqa: E402

pytestmark = [
    # Which parameter is which is not the subject here.
    pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning"),
]

Parameters = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Whether it computes in bfloat16 is one for the whole process; older versions keep it in the environment.
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def trainer(
    folder: Path,
    build: Callable[[], Any] = gpt2,
    *,
    callbacks: list[Any] | None = None,
    dataset: Any = None,
    kind: Any = None,
    **arguments: Any,
) -> Any:
    """Two micro-batches of 4 to an update, 27 examples: epochs of 4 updates, the last micro-batch incomplete."""
    transformers.set_seed(0)
    settings: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 9,
        "learning_rate": 0.01,
    }
    return (kind or transformers.Trainer)(
        model=build(),
        args=transformers.TrainingArguments(**settings | arguments),
        train_dataset=Numbers() if dataset is None else dataset,
        eval_dataset=Numbers(6),
        callbacks=callbacks,
    )


def trained(done: Any) -> Parameters:
    return {name: tensor.detach().clone() for name, tensor in done.model.named_parameters()}


def assert_same(left: Parameters, right: Parameters) -> None:
    assert list(left) == list(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def indices(run: Run, t: int) -> list[list[int]]:
    return [micro_batch.indices.tolist() for micro_batch in run.step(t).micro_batches]


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (gpt2, {}),
        (gpt2, {"dataloader_num_workers": 2}),
        (gpt2, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "eval_strategy": "no"}),
        (gpt2, {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 1}),
        (bert, {"gradient_accumulation_steps": 3, "remove_unused_columns": True}),
        (
            bert,
            {
                "dataloader_num_workers": 1,
                "gradient_accumulation_steps": 1,
                "dataloader_drop_last": True,
                "eval_strategy": "no",
            },
        ),
        (t5, {}),
    ],
)
def test_a_recorded_training_is_the_same_and_knows_its_examples(
    tmp_path: Path, build: Callable[[], Any], arguments: dict[str, Any]
) -> None:
    stock = trainer(tmp_path, build, **arguments)
    stock.train()
    recorded = trainer(tmp_path, build, callbacks=[RecorderCallback(tmp_path / "run", strict=True)], **arguments)
    recorded.train()
    assert_same(trained(stock), trained(recorded))
    evaluated = [
        [entry["eval_loss"] for entry in each.state.log_history if "eval_loss" in entry] for each in (stock, recorded)
    ]
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == (0 if "eval_strategy" in arguments else 5)
    run = Run(tmp_path / "run")
    assert run.manifest.state == "complete"
    assert list(run.steps) == list(range(9))
    final = run.parameters(9)
    assert_same({name: trained(recorded)[name] for name in final}, final)
    data = Numbers()
    accumulated = arguments.get("gradient_accumulation_steps", 2)
    drop_last = arguments.get("dataloader_drop_last", False)
    batches = EXAMPLES // 4 if drop_last else -(-EXAMPLES // 4)
    updates = -(-batches // accumulated)
    for t in run.steps:
        step = run.step(t)
        assert step.epoch == t // updates + 1
        expected = accumulated if (t + 1) % updates or batches % accumulated == 0 else batches % accumulated
        assert len(step.micro_batches) == expected
        for micro_batch in step.micro_batches:
            batch = micro_batch.batch()
            assert sorted(batch) == ["input_ids", "labels"]
            given = [data[index] for index in micro_batch.indices.tolist()]
            for name, tensor in batch.items():
                assert torch.equal(tensor, torch.stack([example[name] for example in given]))
    seen = [index for t in range(updates) for part in indices(run, t) for index in part]
    assert len(seen) == len(set(seen)) == (batches * 4 if drop_last else EXAMPLES)


@pytest.mark.parametrize("build", [gpt2, bert, t5])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_recorded_losses_are_summed_cross_entropies(
    tmp_path: Path, build: Callable[..., Any], accumulated: int
) -> None:
    callback = RecorderCallback(tmp_path / "run", strict=True)
    trainer(
        tmp_path, lambda: build(0.0), callbacks=[callback], max_steps=4, gradient_accumulation_steps=accumulated
    ).train()
    run = Run(tmp_path / "run")
    model = build(0.0).double().eval()
    for t in run.steps:
        model.load_state_dict(run.parameters(t), strict=False)
        for micro_batch in run.step(t).micro_batches:
            batch = micro_batch.batch()
            logits = model(**batch).logits.detach()
            labels = batch["labels"]
            if build is gpt2:
                logits, labels = logits[:, :-1], labels[:, 1:]
            asked = labels != -100
            losses = -logits.log_softmax(-1)[asked].gather(-1, labels[asked][:, None])
            assert micro_batch.predictions == int(asked.sum())
            assert micro_batch.loss_sum == pytest.approx(float(losses.sum()), rel=1e-5)


@pytest.mark.parametrize("build", [gpt2, bert, t5])
@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, {"max_grad_norm": 0.1, "optim": "sgd", "warmup_steps": 2}])
def test_replay_does_the_updates_again(tmp_path: Path, build: Callable[[], Any], arguments: dict[str, Any]) -> None:
    trainer(
        tmp_path, build, callbacks=[RecorderCallback(tmp_path / "run", strict=True)], max_steps=3, **arguments
    ).train()
    run = Run(tmp_path / "run")
    assert run.manifest.recipe.get("autocast") == ("bfloat16" if arguments.get("bf16") else None)
    report = check_update(run, TrainerWorkload(build, Numbers(), Numbers(6)), data=True)
    assert "losses and parameters are the recorded ones" in report.text
    assert "not compared" not in report.text


@pytest.mark.parametrize("build", [gpt2, bert])
def test_a_loss_of_another_kind_is_not_told(tmp_path: Path, build: Callable[[], Any]) -> None:
    run = tmp_path / "run"
    trainer(
        tmp_path, build, callbacks=[RecorderCallback(run, strict=True)], max_steps=2, label_smoothing_factor=0.2
    ).train()
    assert {part.loss_sum for t in (0, 1) for part in Run(run).step(t).micro_batches} == {None}
    workload = TrainerWorkload(build, Numbers(), label_smoothing=0.2)
    assert "parameters are the recorded ones" in check_update(Run(run), workload, data=True).text


class InterruptedTrainingError(RuntimeError):
    pass


class Interrupting(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise InterruptedTrainingError


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_resumed_in_the_middle_of_an_epoch_goes_on_with_its_run(tmp_path: Path, workers: int) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": workers}
    whole = trainer(tmp_path, callbacks=[RecorderCallback(tmp_path / "whole", strict=True)], **settings)
    whole.train()
    broken = trainer(
        tmp_path / "again", callbacks=[RecorderCallback(tmp_path / "run", strict=True), Interrupting(8)], **settings
    )
    with pytest.raises(InterruptedTrainingError):
        broken.train()
    assert Run(tmp_path / "run").manifest.state == "incomplete: training ended with InterruptedTrainingError"
    assert list(Run(tmp_path / "run").steps) == list(range(8))
    resumed = trainer(tmp_path / "again", callbacks=[RecorderCallback(tmp_path / "run", strict=True)], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoints" / "checkpoint-6"))
    assert_same(trained(whole), trained(resumed))
    expected, run = Run(tmp_path / "whole"), Run(tmp_path / "run")
    assert run.manifest.state == "complete"
    assert list(run.steps) == list(range(9))
    assert [entry.first_step for entry in run.manifest.attempts] == [0, 6]
    for t in run.steps:
        assert indices(run, t) == indices(expected, t)
        assert run.step(t).epoch == expected.step(t).epoch == t // 4 + 1
        assert_same(run.parameters(t + 1), expected.parameters(t + 1))


def test_a_training_resumed_from_elsewhere_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer(tmp_path, callbacks=[RecorderCallback(tmp_path / "run", strict=True)], **settings).train()
    trainer(tmp_path / "other", learning_rate=0.1, **settings).train()
    resumed = trainer(tmp_path, callbacks=[RecorderCallback(tmp_path / "run")], **settings)
    with pytest.raises(JoinError):
        resumed.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoints" / "checkpoint-3"))


def test_steps_are_on_the_disk_before_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = tmp_path / "checkpoints"
    flush, found = Recording.flush, []

    def flushed(recording: Recording) -> None:
        flush(recording)
        found.append(sorted(path.name for path in checkpoints.glob("checkpoint-*")))

    monkeypatch.setattr(Recording, "flush", flushed)
    callback = RecorderCallback(tmp_path / "run", strict=True)
    trainer(tmp_path, callbacks=[callback], save_strategy="steps", save_steps=2, max_steps=4).train()
    assert found == [[], ["checkpoint-2"]]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("error", [InterruptedTrainingError, KeyboardInterrupt])
def test_a_training_that_fails_ends_its_recording_and_leaves_all_as_it_was(
    tmp_path: Path, error: type[BaseException]
) -> None:
    class Failing(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            if self.state.global_step == 2:
                raise error
            return super().compute_loss(*arguments, **named)

    callback = RecorderCallback(tmp_path / "run", strict=True)
    failing = trainer(tmp_path, callbacks=[callback], kind=Failing)
    with pytest.raises(error):
        failing.train()
    assert callback.recording is None
    run = Run(tmp_path / "run")
    assert run.manifest.state == f"incomplete: training ended with {error.__name__}"
    assert list(run.steps) == [0, 1]
    assert not {"training_step", "get_batch_samples", "save_model"} & set(vars(failing))
    assert type(failing.callback_handler.train_dataloader.dataset) is Numbers
    # Its lock is free: the next training takes the run up again, in the same process.
    trainer(tmp_path, callbacks=[RecorderCallback(tmp_path / "run", strict=True)], max_steps=3).train()
    assert Run(tmp_path / "run").manifest.state == "complete"


def test_updates_that_a_scaler_skipped_are_no_steps_of_the_run(tmp_path: Path) -> None:
    # A checkpoint of a training in float16 that skipped one of its three updates.
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, callbacks=[RecorderCallback(tmp_path / "run", strict=True)], **settings).train()
    state = tmp_path / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    told = json.loads(state.read_text())
    told["global_step"] = 3
    told["stateful_callbacks"][SKIPPED] = {"updates": 1}
    state.write_text(json.dumps(told))
    resumed = trainer(tmp_path, callbacks=[RecorderCallback(tmp_path / "run", strict=True)], max_steps=5)
    resumed.train(resume_from_checkpoint=str(state.parent))
    assert list(Run(tmp_path / "run").steps) == [0, 1, 2, 3]


def test_methods_overridden_in_a_trainer_still_do_their_work(tmp_path: Path) -> None:
    class Doubling(transformers.Trainer):  # type: ignore[misc]
        steps = 0

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            self.steps += 1
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            return 2 * super().compute_loss(model, inputs, *arguments, **named)

    settings: dict[str, Any] = {"kind": Doubling, "max_steps": 3, "eval_strategy": "no"}
    stock = trainer(tmp_path, **settings)
    stock.train()
    recorded = trainer(tmp_path, callbacks=[RecorderCallback(tmp_path / "run", strict=True)], **settings)
    recorded.train()
    assert stock.steps == recorded.steps == 6
    assert_same(trained(stock), trained(recorded))
    # Twice the cross-entropy is neither its sum nor its mean.
    assert {part.loss_sum for t in range(3) for part in Run(tmp_path / "run").step(t).micro_batches} == {None}


class Streamed(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        data = Numbers()
        for index in range(EXAMPLES):
            yield {name: data[index][name] for name in ("input_ids", "labels")}


def test_streamed_examples_are_recorded_without_indices(tmp_path: Path) -> None:
    stock = trainer(tmp_path, dataset=Streamed(), max_steps=3)
    stock.train()
    recorded = trainer(
        tmp_path, dataset=Streamed(), callbacks=[RecorderCallback(tmp_path / "run", strict=True)], max_steps=3
    )
    with pytest.warns(RecorderWarning, match="come without the indices of their examples"):
        recorded.train()
    assert_same(trained(stock), trained(recorded))
    run = Run(tmp_path / "run")
    assert indices(run, 0) == [[], []]
    assert torch.equal(run.step(0).micro_batches[1].batch()["input_ids"], Numbers().numbers[4:8])


def test_a_loader_of_the_users_own_carries_indices_too(tmp_path: Path) -> None:
    class Own(transformers.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                self.train_dataset,
                batch_size=3,
                shuffle=True,
                collate_fn=lambda rows: {
                    name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")
                },
            )

    trainer(tmp_path, kind=Own, callbacks=[RecorderCallback(tmp_path / "run", strict=True)], max_steps=3).train()
    run = Run(tmp_path / "run")
    for t in run.steps:
        for micro_batch in run.step(t).micro_batches:
            assert len(micro_batch.indices) == 3
            assert torch.equal(micro_batch.batch()["input_ids"], Numbers().numbers[micro_batch.indices])


def test_only_chosen_steps_are_recorded(tmp_path: Path) -> None:
    callback = RecorderCallback(tmp_path / "run", steps="0:1,4:6", batches="indices", segment_steps=2, strict=True)
    trainer(tmp_path, callbacks=[callback]).train()
    run = Run(tmp_path / "run")
    assert list(run.steps) == [0, 4, 5]
    assert not run.step(5).micro_batches[0].stored
    assert run.step(5).epoch == 2


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="batches is 'store' or 'indices'"):
        trainer(tmp_path, callbacks=[RecorderCallback(tmp_path / "run", batches="all")]).train()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"RecorderCallback works within transformers\.trainer\.Trainer\.train"):
        RecorderCallback(tmp_path / "run").on_train_begin(None, None, None)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_example_goes_the_whole_way(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cube = go_the_whole_way("hf_trainer.py", f"runs/{name}", tmp_path / name, capsys, steps=12)
    assert float((cube["loss_end"] - cube["loss_start"]).sel(data="probe").sum()) < 0
    assert cube["epoch"].values.tolist() == [1] * 8 + [2] * 4
