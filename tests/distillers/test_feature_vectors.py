"""Methods on features against their authors' code in float64: values, and gradients to inputs and weights."""

import numpy as np
import pytest
import torch
from torch import nn

from kdav_fast.distillers import diffkd, norm
from kdav_fast.distillers.base import Progress, Shapes
from kdav_fast.distillers.reviewkd import hierarchical_context
from kdav_fast.distillers.terms.maps import to_common_height
from kdav_fast.distillers.terms.self_supervision import similarities, trusted
from kdav_fast.distillers.wcord import sinkhorn_plan
from kdav_fast.models.outputs import Outputs
from tests.distillers.feature_case import FeatureCase
from tests.distillers.golden import golden_cases

RECIPE = {"weight_cls": "weight_label", "weight_div": "weight_kl", "weight_feature": "weight_feature"}
"""Settings of the recipe that most share, and keys of our sections."""


def recipe(case):
    keys = {key: case.hyper(name) for name, key in RECIPE.items() if f"hyper_{name}" in case}
    if "hyper_temperature_div" in case:
        keys["temperature"] = case.hyper("temperature_div")
    return keys


def shapes(name, stages=(), features=1):
    return Shapes(name, features, tuple(tuple(stage.shape[1:]) for stage in stages))


def staged(case, who, numbered):
    return case.numbered(f"{who}_feature") if numbered else (case[f"{who}_feature"],)


def run_on_maps(case, method, numbered, names, prefix=None, **keys):
    """A method that compares maps alone."""
    student, teacher = (staged(case, who, numbered) for who in ("student", "teacher"))
    facts = case.facts(shapes("student", student), shapes("teacher", teacher))
    distiller = case.build(method, facts, **recipe(case), **keys)
    for name, one in distiller.learned().items():
        case.load(name, one.module)
    losses = case.run(
        distiller, case.outputs("student", stages=student), case.outputs("teacher", stages=teacher)
    )
    case.check(losses.total, losses.parts, names={"cross_entropy": "ce", **names})
    return distiller


def run_on_embeddings(case, method, names, keys):
    """A method that compares pooled features alone, and learns nothing beside the student."""
    student, teacher = (case[f"{who}_embedding"] for who in ("student", "teacher"))
    facts = case.facts(
        shapes("student", features=student.shape[1]), shapes("teacher", features=teacher.shape[1])
    )
    distiller = case.build(method, facts, **keys(case))
    losses = case.run(distiller, case.outputs("student", student), case.outputs("teacher", teacher))
    case.check(losses.total, losses.parts, names=names)


@pytest.mark.parametrize("name", golden_cases("FitNets"))
def test_fitnets(name, agrees):
    run_on_maps(FeatureCase(name, agrees), "fitnets", False, {"hint_mse": "loss_hint"}, stage=-1)


@pytest.mark.parametrize("name", golden_cases("AT"))
def test_at(name, agrees):
    run_on_maps(FeatureCase(name, agrees), "at", True, {"attention_mse": "loss_at"})


@pytest.mark.parametrize("name", golden_cases("VID"))
def test_vid(name, agrees):
    case = FeatureCase(name, agrees)
    distiller = run_on_maps(case, "vid", True, {"variational_nll": "loss_vid"})
    fresh = case.build(
        "vid",
        case.facts(
            shapes("s", case.numbered("student_feature")), shapes("t", case.numbered("teacher_feature"))
        ),
    )
    first = fresh.learned()["vid"].module[0].log_scale
    torch.testing.assert_close(first, case["init_log_scale"].to(first.dtype)[: len(first)])
    assert len(distiller.learned()["vid"].module) == len(case.numbered("student_feature"))


@pytest.mark.parametrize("setting", ["", "_toolbox"])
@pytest.mark.parametrize("name", golden_cases("SRRL"))
def test_srrl(name, agrees, setting):
    case = FeatureCase(name, agrees, setting)
    head = case.load("teacher_head", nn.Linear(*case["teacher_head.weight"].shape[::-1]))
    teacher_map = case["teacher_feature"]
    teacher = case.outputs("teacher", teacher_map.mean((2, 3)), [teacher_map])
    if setting:
        student = case.outputs(
            "student", case["student_embedding_toolbox"], [case["student_feature"].detach()]
        )
        keys, names = {"connector": "pooled", "weight_kl": 1.0}, {"soft_target_kl": "loss_div_toolbox"}
    else:
        student = case.outputs("student", stages=[case["student_feature"]])
        keys = {f"weight_{part}": case.hyper(f"weight_{part}") for part in ("statistics", "regression")}
        names = {"statistics_mse": "loss_statistics", "regression_mse": "loss_regression"}
    facts = case.facts(
        shapes("student", student.stages, student.features.shape[1]),
        shapes("teacher", teacher.stages),
        teacher_classifier=head,
    )
    distiller = case.build("srrl", facts, **keys)
    case.load("connector.Connectors", distiller.learned()["connector"].module)
    losses = case.run(distiller, student, teacher)
    case.check(losses.total, losses.parts, names={"cross_entropy": "ce", **names})
    assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize("name", golden_cases("ReviewKD"))
def test_reviewkd(name, agrees):
    case = FeatureCase(name, agrees)
    student, teacher = (case.numbered(f"{who}_feature") for who in ("student", "teacher"))
    if "ce" not in case:  # the loss alone, of maps that are no squares
        loss = case.hyper("weight_feature") * sum(map(hierarchical_context, student, teacher)).mean()
        case.check(loss, {}, names={})
        return
    *student_maps, student_pooled = student
    *teacher_maps, teacher_pooled = teacher
    facts = case.facts(*(shapes("either", maps[:-1], maps[-1].shape[1]) for maps in (student, teacher)))
    width = int(case.hyper("mid_channel"))
    distiller = case.build("reviewkd", facts, stages=len(student_maps), width=width, **recipe(case))
    for number, fusion in enumerate(distiller.learned()["review"].module.abf):
        case.load(f"abf_{number}", fusion)
    losses = case.run(
        distiller,
        case.outputs("student", student_pooled.flatten(1), student_maps),
        case.outputs("teacher", teacher_pooled.flatten(1), preactivations=teacher_maps),
        epoch=20 * case.hyper("warmup_factor") + 0.5,
    )
    names = {"cross_entropy": "ce", "review_hcl": "loss_hcl"}
    case.check(losses.total, losses.parts, names=names)


@pytest.mark.parametrize("name", golden_cases("CRD"))
def test_crd(name, agrees, monkeypatch):
    """Two steps: of the second, Z and the memories are those that the first one left."""
    case = FeatureCase(name, agrees)
    facts = case.facts(
        *(shapes(who, features=case[f"{who}_embedding"].shape[1]) for who in ("student", "teacher")),
        labels=np.arange(int(case.hyper("n_data"))) % 7,
    )
    settings = {"negatives": int(case.hyper("negatives")), "contrast_temperature": case.hyper("temperature")}
    settings |= {"momentum": case.hyper("momentum"), "width": case["memory_student"].shape[1]}
    distiller = case.build("crd", facts, **recipe(case), **settings)
    memories = {"student": distiller.student_memory, "teacher": distiller.teacher_memory}
    everyone = torch.arange(len(facts.labels))
    for who, memory in memories.items():
        memory.update(everyone, case[f"memory_{who}"])
    for step in ("", "second_"):
        case = FeatureCase(name, agrees, prefix=step)
        for embed in ("embed_s", "embed_t"):
            case.load(embed, distiller.learned()[embed].module)
        drawn = torch.zeros(len(case["index"]), len(everyone), dtype=torch.float64)
        negatives = case["contrast_index"][:, 1:]
        drawn.scatter_add_(1, negatives, torch.ones_like(negatives, dtype=torch.float64))
        monkeypatch.setattr(distiller.negatives, "draw", lambda labels, step, drawn=drawn: (everyone, drawn))
        student, teacher = (case.outputs(who, case[f"{who}_embedding"]) for who in ("student", "teacher"))
        losses = case.run(distiller, student, teacher, index=case["index"])
        names = {part: f"loss_{part}" for part in ("student_anchor", "teacher_anchor")}
        case.check(losses.total, losses.parts, names={"cross_entropy": "ce", **names})
        for who, memory in memories.items():
            case.check_value(memory.rows(everyone), f"after_memory_{who}")
        case.check_value(distiller.student_z, "after_z_student")
        case.check_value(distiller.teacher_z, "after_z_teacher")


@pytest.mark.parametrize("name", golden_cases("SP"))
def test_sp(name, agrees):
    run_on_maps(FeatureCase(name, agrees), "sp", False, {"similarity_mse": "loss_sp"})


@pytest.mark.parametrize("name", golden_cases("PKT"))
def test_pkt(name, agrees):
    run_on_embeddings(
        FeatureCase(name, agrees), "pkt", {"cross_entropy": "ce", "similarity_kl": "loss_pkt"}, recipe
    )


@pytest.mark.parametrize("setting", ["", "_cifar"])
@pytest.mark.parametrize("name", golden_cases("RKD"))
def test_rkd(name, agrees, setting):
    def keys(case):
        return {"weight_label": 0.0} | {
            f"weight_{part}": case.hyper(f"weight_{part}{setting}") for part in ("distance", "angle")
        }

    names = {"distance": "loss_distance", "angle": "loss_angle"}
    run_on_embeddings(FeatureCase(name, agrees, setting), "rkd", names, keys)


@pytest.mark.parametrize("setting", ["", "_times_m", "_through_plan"])
@pytest.mark.parametrize("name", golden_cases("WCoRD"))
def test_wcord(name, agrees, monkeypatch, setting):
    case = FeatureCase(name, agrees, setting)
    memory, negatives = case["memory_teacher"], case["negative_index"]
    widths = (case[f"{who}_embedding"].shape[1] for who in ("student", "teacher"))
    facts = case.facts(
        *(shapes("either", features=width) for width in widths), labels=np.arange(len(memory)) % 7
    )
    keys = {f"weight_{part}": case.hyper(f"weight_{part}") for part in ("global", "local")}
    keys |= {"epsilon": case.hyper("epsilon"), "rounds": int(case.hyper("sinkhorn_iterations"))}
    many = float(negatives.shape[1]) if setting == "_times_m" else 1.0
    distiller = case.build(
        "wcord",
        facts,
        **keys,
        negative_weight=many,
        through_plan=setting == "_through_plan",
        width=memory.shape[1],
    )
    everyone = torch.arange(len(memory))
    distiller.memory.update(everyone, memory)
    drawn = torch.zeros(len(negatives), len(memory), dtype=torch.float64)
    drawn.scatter_add_(1, negatives, torch.ones_like(negatives, dtype=torch.float64))
    monkeypatch.setattr(distiller.negatives, "draw", lambda labels, step: (everyone, drawn))
    for head in ("head_s", "head_t"):
        case.load(head, distiller.learned()[head].module)
    student, teacher = (case.outputs(who, case[f"{who}_embedding"]) for who in ("student", "teacher"))
    z_s = distiller.learned()["head_s"].module(student.features)
    z_t = distiller.learned()["head_t"].module(teacher.features)
    case.check_value(z_s, "projected_student")
    case.check_value(z_t, "projected_teacher")
    valid = torch.ones(len(z_s), dtype=torch.bool)
    case.check_value(sinkhorn_plan(1 - z_t @ z_s.T, valid, keys["epsilon"], keys["rounds"]), "plan")
    losses = case.run(distiller, student, teacher)
    names = {"cross_entropy": "ce", "dual_wasserstein": "loss_global", "transport_cost": "loss_local"}
    if setting == "_times_m":
        names["dual_wasserstein"] = "loss_global_times_m"
        expected = (
            case["ce"]
            + keys["weight_global"] * case["loss_global_times_m"]
            + keys["weight_local"] * case["loss_local"]
        )
        case.arrays["loss_times_m"] = expected.numpy()
    case.check(
        losses.total, losses.parts, names=names, total_name="loss" if setting == "_through_plan" else None
    )


@pytest.mark.parametrize("name", golden_cases("SSKD"))
def test_sskd(name, agrees):
    case = FeatureCase(name, agrees)
    hyper = {"weight_label": "ce_weight", "weight_kl": "kd_weight", "weight_transform": "tf_weight"}
    hyper |= {"weight_similarity": "ss_weight", "temperature": "kd_T", "similarity_temperature": "ss_T"}
    hyper |= {"ratio_transform": "ratio_tf", "ratio_similarity": "ratio_ss"}
    assert case.hyper("kd_T") == case.hyper("tf_T")
    widths = [case[f"{who}_feature"].shape[1] for who in ("student", "teacher")]
    facts = case.facts(*(shapes("either", features=width) for width in widths))
    distiller = case.build("sskd", facts, **{key: case.hyper(value) for key, value in hyper.items()})
    heads = {name: case.load(name, one.module) for name, one in distiller.learned().items()}

    def by_view(rows):
        """Rows there come in fours."""
        return rows.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)

    student, teacher = (
        Outputs(by_view(case[f"{who}_feature"]), by_view(case[f"{who}_logits"]))
        for who in ("student", "teacher")
    )
    rows = len(case["target"])
    valid, turned = torch.ones(rows, dtype=torch.bool), torch.arange(rows).repeat_interleave(3)
    scores = similarities(heads["teacher_head"](case["teacher_feature"]).unflatten(0, (-1, 4)), valid)
    logits = case["teacher_logits"].unflatten(0, (-1, 4))[:, 1:].flatten(0, 1)
    for what, given, answer, ratio in (
        ("selfsupervised", scores, turned, "ratio_ss"),
        ("transform", logits, case["target"][turned], "ratio_tf"),
    ):
        kept = trusted(given, answer, valid.repeat_interleave(3), case.hyper(ratio))
        assert torch.equal(kept.nonzero().flatten(), case[f"keep_{what}"])
    before = distiller.head_loss(teacher, case.batch(rows, 4), heads).total
    case.check_value(before, "loss_teacher_head")
    before.backward()
    losses = case.run(distiller, student, teacher)
    names = {"cross_entropy": "ce", "soft_target_kl": "loss_kd", "transform_kl": "loss_transform"}
    case.check(losses.total, losses.parts, names={**names, "similarity_kl": "loss_selfsupervised"})


@pytest.mark.parametrize("name", golden_cases("DiffKD"))
def test_diffkd(name, agrees, monkeypatch):
    case = FeatureCase(name, agrees)
    student, teacher = (case[f"{who}_feature"] for who in ("student", "teacher"))
    facts = case.facts(shapes("student", [student]), shapes("teacher", [teacher]))
    autoencoder = bool(case.arrays["hyper_use_autoencoder"])
    keys = {"autoencoder": autoencoder, "width": case["feature_noise_student"].shape[1]}
    # The gradients are of all terms but the cross-entropy.
    keys |= dict.fromkeys(("weight_feature", "weight_logit"), case.hyper("weight_distill")) | {
        "weight_label": 0.0
    }
    keys |= {"steps": int(case.hyper("inference_steps")), "logit_temperature": case.hyper("tau")}
    distiller = case.build("diffkd", facts, **keys)
    for branch, one in distiller.learned().items():
        case.load(branch, one.module)
        assert one.module.times == case["inference_timesteps"].tolist()
        agrees(one.module.shares, case["alphas_cumprod"])

    def draw(index, moment, branch, shape):
        kind = ("feature", "logit")[branch]
        return diffkd.Noises(
            *(case[f"{kind}_{what}"] for what in ("noise_student", "noise_teacher", "timesteps"))
        )

    monkeypatch.setattr(diffkd, "draw", draw)
    losses = case.run(
        distiller, case.outputs("student", stages=[student]), case.outputs("teacher", stages=[teacher])
    )
    parts = ["feature_diffusion", "feature_distill", "logit_diffusion", "logit_distill"]
    parts += ["feature_autoencoder"] * autoencoder
    case.check(
        losses.total, losses.parts, names={part: f"loss_{part}" for part in parts}, total_name="loss_distill"
    )


@pytest.mark.parametrize("name", golden_cases("NORM"))
def test_norm(name, agrees):
    case = FeatureCase(name, agrees)
    student, teacher = (case[f"{who}_feature"] for who in ("student", "teacher"))
    facts = case.facts(
        shapes("student", [student]), shapes("teacher", [teacher]), classes=len(case["head.bias"])
    )
    share = case.hyper("schedule_factor")
    schedule, epoch = next(
        (schedule, epoch)
        for schedule in ("cifar", "imagenet")
        for epoch in (0.5, 18.5, 100.5, 190.5, 230.5)
        if norm.share(schedule, Progress(0, 1, epoch, 240.0)) == share
    )
    distiller = case.build("norm", facts, **recipe(case), copies=int(case.hyper("copies")), schedule=schedule)
    head = distiller.head()
    for prefix, module in {"expand": head.expand, "reduce": head.reduce, "head": head.linear}.items():
        case.load(prefix, module)
    embedding, expanded = head(student)
    case.check_value(expanded, "expanded_feature")
    logits = head.classify(embedding)
    case.check_value(logits, "student_logits")
    answers = Outputs(embedding, logits.detach(), embedding, (student,), head_map=expanded)
    losses = case.run(distiller, answers, case.outputs("teacher", stages=[teacher]), epoch)
    names = {"cross_entropy": "ce", "many_to_one": "loss_norm"}
    if case.hyper("weight_div") > 0:
        names["soft_target_kl"] = "loss_div"
    case.check(losses.total, losses.parts, names=names)


@pytest.mark.parametrize("name", golden_cases("CoCoRD"))
def test_cocord(name, agrees, monkeypatch):
    case = FeatureCase(name, agrees)
    hidden, width = case["s_q_proj.0.weight"].shape
    embedding, predictor = case["s_q_pred.3.weight"].shape
    facts = case.facts(*2 * [shapes("either", features=width)])
    keys = {"hidden": hidden, "width": embedding, "predictor": predictor, "queue": case["queue"].shape[1]}
    keys |= {
        "contrast_temperature": case.hyper("temperature"),
        "slow_momentum": case.hyper("momentum_slow_student"),
    }
    keys |= {"teacher_momentum": case.hyper("momentum_teacher_head"), "weight_label": 0.0}
    keys |= {f"weight_{part}": case.hyper(f"weight_{part}") for part in ("contrast", "predict")}
    distiller = case.build("cocord", facts, **keys)
    learned = {name: case.load(name, one.module) for name, one in distiller.learned().items()}
    slow = {"s_k_proj": distiller.slow_proj, "t_k_proj": distiller.teacher_proj}
    for prefix, module in slow.items():
        for key, buffer in module.named_buffers():
            if f"{prefix}.{key}" in case:
                buffer.copy_(case[f"{prefix}.{key}"])
    distiller.queue.push(case["queue"].T, torch.ones(keys["queue"], dtype=torch.bool))
    distiller.queue.pointer.copy_(case["queue_pointer"])

    distiller.meet(nn.Identity())
    distiller.after_step(nn.Identity(), learned)  # there, averages are taken at the beginning of a step
    for prefix, module in slow.items():
        for key, buffer in module.named_buffers():
            if f"after_{prefix}.{key}" in case:
                case.check_value(buffer, f"after_{prefix}.{key}")
    monkeypatch.setattr(
        distiller, "slow_features", lambda views: [case["slow_feature_q"], case["slow_feature_k"]]
    )
    q, k, teacher = case["student_feature_q"], case["student_feature_k"], case["teacher_feature"]
    third = torch.zeros_like(teacher)
    student = Outputs(torch.cat([q, k, third]), case["student_logits"].repeat(3, 1))
    taught = Outputs(torch.cat([third, third, teacher]), student.logits)
    losses = case.run(distiller, student, taught)
    # The gradients are of all terms but the cross-entropy.
    names = {"contrast": "loss_contrast", "consistency": "loss_predict", "cross_entropy": "ce"}
    case.check(losses.total, losses.parts, names=names, total_name="loss_distill")
    case.check_value(distiller.queue.rows.T, "after_queue")
    assert distiller.queue.pointer == case["after_queue_pointer"]


@pytest.mark.parametrize("name", golden_cases("SimKD"))
def test_simkd_s_published_term(name, agrees):
    case = FeatureCase(name, agrees)
    maps = [case[f"{who}_feature"] for who in ("student", "teacher")]
    head = case.load("teacher_head", nn.Linear(*case["teacher_head.weight"].shape[::-1]))
    facts = case.facts(
        *(shapes("either", [each], each.shape[1]) for each in maps),
        classes=head.out_features,
        teacher_classifier=head,
    )
    distiller = case.build(
        "simkd", facts, weight_map=case.hyper("weight_feature"), factor=int(case.hyper("factor"))
    )
    projector = case.load("projector", distiller.learned()["projector"].module)
    student, target = to_common_height(*maps)
    case.check_value(target, "target_feature")
    projected = projector(student)
    case.check_value(projected, "projected_feature")
    case.check_value(head(projected.mean((2, 3))), "student_logits_through_teacher_head")

    # Beside it the pooled features, as they are: no difference.
    pooled = [Outputs(each.mean((2, 3)).detach(), torch.zeros(len(each), 1), stages=(each,)) for each in maps]
    losses = case.run(distiller, pooled[0]._replace(embedding=pooled[1].features), pooled[1])
    case.check(losses.total, losses.parts, names={"map_mse": "loss_feature"})
