"""Hinton's distillation against its formula, in float64, padding left out."""

import math

import torch
import torch.nn.functional as F


def test_it_is_hinton_s_formula(batch, build, losses):
    student, teacher, images = batch
    alpha, temperature = 0.7, 3.0
    found = losses(build("kd", alpha=alpha, temperature=temperature), batch)
    f, g = student.logits[:6].double(), teacher.logits[:6].double()
    kl = 0.0
    for i in range(6):
        p, q = torch.softmax(f[i] / temperature, 0), torch.softmax(g[i] / temperature, 0)
        kl += sum(float(b) * math.log(float(b) / float(a)) for a, b in zip(p, q, strict=True)) / 6
    ce = F.cross_entropy(f, images.labels[:6])
    expected = (1 - alpha) * ce + alpha * temperature**2 * kl
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-5, atol=1e-6)
    assert set(found.parts) == {"cross_entropy", "soft_target_kl"}
