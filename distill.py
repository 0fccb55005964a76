"""Progressive SuperNet Distillation (Eq. 4): the previous stage teaches the next, less and less."""
import torch.nn.functional as F


def ratio(progress, first=0.5, last=0.05):  # task 4.2
    """lambda at `progress` in [0, 1] of a stage: linearly from 0.5 to 0.05, as the paper says."""
    return first + (last - first) * progress


def loss(student_logits, teacher_logits, target, lam):  # task 4.1
    """Eq. 4: (1 - lam) * hard + lam * soft.

    student_logits, teacher_logits: (B, classes); target: labels (B,); lam in [0, 1]. Returns a scalar.
    Without a teacher (None: A0 has none) or with lam = 0 it is the cross-entropy. The paper does not name
    the soft loss: we take the KL divergence from the teacher's distribution at temperature 1, summed over
    classes and averaged over the batch. No gradient reaches the teacher.
    """
    hard = F.cross_entropy(student_logits, target)
    if teacher_logits is None or lam == 0:
        return hard
    student, teacher = F.log_softmax(student_logits, 1), F.log_softmax(teacher_logits.detach(), 1)
    return (1 - lam) * hard + lam * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
