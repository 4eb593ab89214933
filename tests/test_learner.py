"""What the loop tunes: ModalTune towards text, and how any learner's cases are embedded."""

from __future__ import annotations

import pytest
import torch

from modaltune.errors import InputError
from modaltune.learner import ModalTuneLearner, Targets, check_finite, embed_all
from modaltune.testing_training import tiny_run_config, write_training_cases
from modaltune.train import TrainConfig
from modaltune.train_prepare import Prepared, prepare


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("study")
    return prepare(tiny_run_config([write_training_cases(folder)], folder / "run"))


def test_losses_handed_to_backward_add_up_to_the_one_returned(ready: Prepared) -> None:
    for trunk, passes in (("separate", 3), ("shared", 1)):
        ready.run.model.adjust(task_trunk=trunk)
        learner = ModalTuneLearner(ready.run.model.eval())
        pulled: list[torch.Tensor] = []

        def backward(loss: torch.Tensor, pulled: list[torch.Tensor] = pulled) -> None:
            pulled.append(loss.detach())
            loss.backward()

        loss = learner.accumulate(ready.train.batch([0, 1]), ready.train.targets([0, 1]), backward)
        assert len(pulled) == passes
        assert float(sum(pulled)) == pytest.approx(float(loss), rel=1e-6)
        assert learner.outputs is not None
        assert not learner.outputs.requires_grad
        text = ready.train.targets([0, 1]).text
        assert text is not None
        assert float(learner.loss(learner.outputs, text)) == pytest.approx(float(loss), rel=1e-5)


def test_without_text_there_is_nothing_to_tune_towards(ready: Prepared) -> None:
    learner = ModalTuneLearner(ready.run.model)
    bare = Targets(None, torch.tensor([1]), torch.tensor([3.0]), torch.tensor([1.0]))
    with pytest.raises(InputError, match=r"targets must hold text rows .* got none; embed the"):
        learner.accumulate(ready.train.batch([0]), bare, lambda loss: loss.backward())


def test_a_loss_that_is_not_finite_names_its_cases_and_drops_gradients(ready: Prepared) -> None:
    model = ready.run.model
    for parameter in model.trainable_parameters():
        parameter.grad = torch.ones_like(parameter)
    batch = ready.train.batch([0, 2])
    check_finite(torch.tensor(1.0), model, batch)
    with pytest.raises(InputError, match=r"got inf on case\(s\) P000, P002;"):
        check_finite(torch.tensor(float("inf")), model, batch)
    assert all(p.grad is None for p in model.parameters())


def test_embeddings_do_not_depend_on_batches_and_leave_the_mode_alone(ready: Prepared) -> None:
    model = ready.run.model
    learner = ModalTuneLearner(model.train(), TrainConfig())
    one = embed_all(learner, ready.train, [4, 0, 6])
    assert model.training
    assert one.shape == (3, 3, 10)
    many = embed_all(learner, ready.train, [4, 0, 6], cases_per_batch=2)
    torch.testing.assert_close(many, one, rtol=0, atol=1e-5)
    general = embed_all(ModalTuneLearner(model, embed_tasks=(0,)), ready.train, [4, 0, 6])
    torch.testing.assert_close(general[:, 0], one[:, 0], rtol=0, atol=1e-5)
    assert general.shape == (3, 1, 10)


def test_targets_keep_what_belongs_to_a_case() -> None:
    targets = Targets.of_text(torch.arange(6.0).reshape(3, 1, 2))
    assert targets.classes.tolist() == [-1] * 3
    assert torch.isnan(targets.durations).all()
    assert torch.isnan(targets.events).all()
    assert len(targets) == 3
    some = targets.rows([2, 0])
    assert some.text is not None
    assert some.text[:, 0, 0].tolist() == [4.0, 0.0]
