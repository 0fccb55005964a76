"""Progressive SuperNet Distillation: (1 - lambda) hard + lambda soft (Eq. 4), lambda from 0.5 to 0.05.

The oracle is the equation in numpy: cross-entropy with the labels, and the KL divergence from the teacher's
distribution to the student's, both averaged over the batch.
"""
import math

import numpy as np
import pytest
import torch
from oracles import seeded
from torch.testing import assert_close

import distill


def case(seed=0, classes=5, n=6):
    g = seeded(seed)
    student, teacher = (3 * torch.randn(n, classes, generator=g, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_(), torch.randint(classes, (n,), generator=g)


def by_hand(student, teacher, target, lam):
    def distribution(logits):
        e = np.exp(logits - logits.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)
    q, p = distribution(student), distribution(teacher)
    hard = -np.mean([math.log(q[n, label]) for n, label in enumerate(target)])
    soft = np.mean([sum(a * math.log(a / b) for a, b in zip(*rows)) for rows in zip(p, q)])
    return (1 - lam) * hard + lam * soft


@pytest.mark.parametrize("lam", [0.05, 0.3, 0.5, 1.0])
def test_the_loss_is_equation_4(lam):
    for seed in range(3):
        student, teacher, target = case(seed)
        found = distill.loss(student, teacher, target, lam)
        assert found.shape == ()
        wanted = by_hand(student.detach().numpy(), teacher.detach().numpy(), target.tolist(), lam)
        assert found.item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("lam", [0.05, 0.5, 1.0])
def test_the_gradient_is_that_of_equation_4_and_reaches_the_student_alone(lam):
    student, teacher, target = case()
    distill.loss(student, teacher, target, lam).backward()
    assert teacher.grad is None
    p, q = teacher.detach().softmax(1), student.detach().softmax(1)
    one_hot = torch.eye(5, dtype=torch.float64)[target]
    assert_close(student.grad, ((1 - lam) * (q - one_hot) + lam * (q - p)) / len(target))
    assert student.grad.abs().min() > 0


def test_the_soft_part_has_a_gradient_of_its_own():
    """With lambda = 1 only the teacher speaks: a loss under no_grad would have none."""
    student, teacher, target = case()
    distill.loss(student, teacher, target, 1.0).backward()
    assert student.grad.abs().max() > 1e-3


def test_without_a_teacher_or_with_lambda_0_it_is_the_cross_entropy():
    student, teacher, target = case()
    wanted = torch.nn.CrossEntropyLoss()(student, target)
    for found in (distill.loss(student, None, target, 0.5), distill.loss(student, teacher, target, 0),
                  distill.loss(student, teacher, target, 0.0), distill.loss(student, None, target, 0.0)):
        assert_close(found, wanted)


def test_a_student_that_says_what_the_teacher_says_has_no_soft_loss():
    student, _, target = case()
    same = student.detach() + 7                                     # a constant added to logits says nothing
    found = distill.loss(student, same, target, 1.0)
    found.backward()
    assert abs(found.item()) < 1e-12 and student.grad.abs().max() < 1e-12
    assert_close(distill.loss(student, same, target, 0.4), 0.6 * torch.nn.CrossEntropyLoss()(student, target))


def test_the_loss_is_finite_for_a_sure_teacher():
    student, teacher = torch.tensor([[50.0, -50.0]]), torch.tensor([[-200.0, 200.0]])
    assert_close(distill.loss(student, teacher, torch.tensor([1]), 0.5), torch.tensor(100.0))


def test_lambda_falls_linearly_from_a_half_to_a_twentieth():
    assert [distill.ratio(n / 4) for n in range(5)] == pytest.approx([0.5, 0.3875, 0.275, 0.1625, 0.05])
