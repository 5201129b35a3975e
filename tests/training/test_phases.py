"""Phases of a training, against single trainings that are given each other's weights; and what each of them may be."""

import json
import operator

import pytest
import torch

from endwise import train
from endwise.common.errors import ConfigError, TrainingStopped
from endwise.config.places import PlacesConfig
from endwise.config.run import RunConfig
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder
from endwise.training import fitting
from endwise.training.course import Course, Phase, rate_factor
from endwise.training.making import new_joint_trainee, new_trainee
from endwise.training.objectives import KL, LocalMSE, Objective, Sparsity
from endwise.training.planning.dry_run import DryRun
from endwise.training.planning.plan import count_flops, plan
from endwise.training.step import take_step
from endwise.training.train import train_places
from own_training import acting, stopping, train_with
from small_gpt2 import SITE, recipe

PHASES = [
    {"share": 0.5, "objective": {"kind": "local"}},
    {"share": 0.3, "objective": {"kind": "horizon", "errors": "absolute"}, "learning_rate": 2e-3, "warmup": 0.4},
    {"share": 0.2, "objective": {"kind": "e2e_ds", "downstream_mse": 2.0}, "optimizer": "fresh"},
]


@pytest.fixture(autouse=True, scope="module")
def measured_on_few():
    """Scales of errors are measured on 512 tokens: more take longer than these trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "MEASURED_ON", 512)
        yield


def phased(out, phases=PHASES, **changes):
    values = recipe(out).model_dump(exclude_unset=True) | {"phases": phases}
    values["objective"] = {"sparsity": {"coefficient": 0.3}} | changes.pop("objective", {})
    values["training"] |= changes
    return RunConfig.build(values)


def by_hand(config, model, corpora, order):
    """The weights after each step, with a loop of its own: one Adam, each phase's gradient from a recipe of its own."""
    steps = len(order)
    of_phase = [new_trainee(each, model, steps) for each in config.in_phases]
    sae = of_phase[0].sae
    optimizer = torch.optim.Adam(sae.parameters())
    ends = [round(steps * sum(phase.share for phase in config.phases[: number + 1])) for number in range(3)]
    start, found = 0, []
    for trainee, phase, end in zip(of_phase, config.phases, ends, strict=True):
        trainee.sae.load_state_dict(sae.state_dict())
        if phase.optimizer == "fresh":
            optimizer = torch.optim.Adam(sae.parameters())
        warm = round(phase.warmup * (end - start))
        for step in range(start, end):
            batch = corpora.train.batch(order[step])
            trainee.sae.zero_grad()
            trainee.sae.begin_step(step / steps)
            clean = model.clean(batch.tokens, record=trainee.sites | trainee.later_sites, final=True)
            trainee.accumulate(model, clean, batch.mask, batch.mask.sum())
            for own, other in zip(sae.parameters(), trainee.sae.parameters(), strict=True):
                own.grad = other.grad.clone()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            rise = min(1.0, (step - start + 1) / (warm + 1))
            largest = phase.learning_rate or config.training.learning_rate
            optimizer.param_groups[0]["lr"] = largest * rise * rate_factor(step, steps, config.training)
            optimizer.step()
            trainee.sae.load_state_dict(sae.state_dict())
            found.append({name: each.clone() for name, each in sae.state_dict().items()})
        start = end
    return found


def test_phases_are_trainings_one_after_another(model, corpora, tmp_path):
    config, order = phased(tmp_path), [range(4 * step, 4 * step + 4) for step in range(20)]
    expected = by_hand(config, model, corpora, order)
    trainee = new_trainee(config, model, len(order))
    for rows, weights in zip(order, expected, strict=True):
        take_step(model, [trainee], corpora.train.batch(rows))
        for name, own in trainee.sae.state_dict().items():
            torch.testing.assert_close(own, weights[name], rtol=1e-4, atol=1e-6)


def relative(out, **more):
    phases = [dict(phase, objective={**phase["objective"], "errors": "relative"}) for phase in PHASES]
    phases[2]["objective"]["sparsity"] = {"target_l0": 5.0}
    return phased(out, phases, objective={"sparsity": {"target_l0": 8}, "errors": "relative"}, **more)


@pytest.fixture(scope="module")
def whole(model, corpora, tmp_path_factory):
    return train(relative(tmp_path_factory.mktemp("whole"), tokens=320), model=model, corpora=corpora, display=False)


@pytest.mark.parametrize(
    "stopped",
    [pytest.param(step, marks=() if step in (4, 5, 7, 8) else pytest.mark.slow) for step in (1, 4, 5, 6, 7, 8)],
)
def test_stopped_anywhere_a_run_ends_in_the_same_bits(model, corpora, tmp_path, whole, stopped):
    config = relative(tmp_path / "cut", tokens=320)
    with pytest.raises(TrainingStopped, match=rf"step {stopped + 1}\b"):
        train_with(acting(stopping(stopped)), [config], model, corpora)
    resumed = train(config, model=model, corpora=corpora, resume=True, display=False)
    ends = [read_checkpoint(RunFolder(run.folder).latest_checkpoint()) for run in (whole, resumed)]
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    own = [name for name in ends[0].tensors if not name.startswith("random.")]
    assert [name for name in own if not torch.equal(ends[0].tensors[name], ends[1].tensors[name])] == []
    assert {"error_scales", "steering", "steering.2"} <= ends[0].tensors.keys()
    lines = [RunFolder(run.folder).metrics_file.read_text() for run in (whole, resumed)]
    assert lines[0] == lines[1]


def test_a_line_names_its_phase_and_holds_that_phases_terms(model, corpora, tmp_path):
    run = train(phased(tmp_path / "run", log_every=1), model=model, corpora=corpora, display=False)
    lines = RunFolder(run.folder).metrics()
    assert [line["phase"] for line in lines] == [1] * 10 + [2] * 6 + [3] * 4
    terms = [{"local_mse"}, {"downstream_mse"}, {"kl", "downstream_mse"}]
    for line in lines:
        own = terms[line["phase"] - 1]
        assert own == {"kl", "downstream_mse", "local_mse"} & line.keys()
        weights = {"kl": 0.5, "local_mse": 1.0, "sparsity": 0.3}
        weights["downstream_mse"] = 2.0 if line["phase"] == 3 else 1.0
        assert line["loss"] == pytest.approx(sum(weights[name] * line[name] for name in (*own, "sparsity")), rel=1e-5)
    rates = [line["learning_rate"] for line in lines]
    settings = run.config.training
    assert rates[12] == pytest.approx(2e-3 * rate_factor(12, 20, settings))
    assert rates[10] == pytest.approx(2e-3 * rate_factor(10, 20, settings) / 3)
    assert "phase" not in train(recipe(tmp_path / "one"), model=model, corpora=corpora, display=False).record


def test_a_steered_coefficient_continues_and_a_new_target_starts_where_it_was():
    term, other = Sparsity(0.3, target_l0=8.0), Sparsity(0.5, target_l0=4.0)
    shares = [(0.3, term), (0.3, term), (0.4, other)]
    phases = [Phase(Objective.of([LocalMSE(1.0), each]), share) for share, each in shares]
    course = Course(phases, recipe("unused").training, 100, torch.device("cpu"))
    assert len(course.schedules) == 2
    weights = []
    for step in range(100):
        l0 = torch.tensor(20.0 if step < 60 else 4.0)
        values = {"l0": l0, "local_mse": torch.ones(()), "sparsity_coefficient": torch.zeros(())}
        weights.append(float(course.schedule(step).term(step).weight))
        course.after_step(step, values, torch.tensor(True))
    assert weights[2] == pytest.approx(0.3) and weights[29] > 0.5
    assert weights[30] == pytest.approx(weights[29], rel=0.2) and weights[30] != weights[29]
    assert weights[60] == pytest.approx(weights[59], rel=0.2)
    assert weights[99] == pytest.approx(weights[60], rel=1e-6)  # at its target it stays


@pytest.mark.parametrize(
    ("balance", "kl", "ratio"),
    [(None, 0.6, 0.6 * 2 / 3), ("gradient", 0.6, 0.6 * 0.5 / 3), (None, 0.0, 1.0), (None, 1e6, 100.0)],
)
def test_a_penalty_keeps_its_share_of_the_loss_where_other_terms_begin(balance, kl, ratio):
    """At its target λ would stay; after the first step of a phase it is multiplied, once, by what the errors, weighted,
    are of those of the step before.
    """
    penalty = Sparsity(0.3, target_l0=8.0)
    phases = [Phase(Objective.of([LocalMSE(1.5), penalty]), 0.5), Phase(Objective.of([KL(2.0), penalty], balance), 0.5)]
    made = [Course(phases, recipe("unused").training, 40, torch.device("cpu")) for _ in range(2)]
    weights = []
    for step in range(40):
        if step == 20:  # what a checkpoint keeps is enough
            made[1].restore({name: tensor.clone() for name, tensor in made[0].tensors().items()})
        course = made[step >= 20]
        terms = {"local_mse": torch.tensor(2.0), "kl": torch.tensor(kl), "kl_coefficient": torch.tensor(0.5)}
        terms["sparsity_coefficient"] = torch.zeros(())
        weights.append(float(course.schedule(step).term(step).weight))
        course.after_step(step, {"l0": torch.tensor(8.0), **terms}, torch.tensor(True))
    assert weights[:21] == pytest.approx([0.3] * 21)
    assert weights[21:] == pytest.approx([0.3 * ratio] * 19)


def test_places_have_phases_alike(model, corpora, tmp_path):
    values = {
        "places": [{"site": "blocks.1.hook_resid_pre"}, {"site": "blocks.2.hook_resid_pre"}],
        "dictionary": {"size": 40},
        "objective": {"sparsity": {"coefficient": 0.3}},
        "phases": [
            {"share": 0.5, "objective": {"kind": "local", "errors": "relative"}},
            {"share": 0.5, "objective": {"kind": "horizon"}},
        ],
        "training": recipe(tmp_path).training.model_dump() | {"log_every": 1, "tokens": 192},
        "evaluation": recipe(tmp_path).evaluation.model_dump(),
    }
    joint = PlacesConfig.build({**values, "out": str(tmp_path / "joint")})
    trainee = new_joint_trainee(joint, model, 6)
    assert [site.name for site in trainee.course.phases[1].objective.sites] == [
        "blocks.2.hook_resid_pre",
        "blocks.3.hook_resid_pre",
    ]
    assert not trainee.parts[0].is_spliced
    run = train_places(joint, model=model, corpora=corpora, display=False)
    lines = RunFolder(run.folder).metrics()
    assert [line["phase"] for line in lines] == [1] * 3 + [2] * 3
    assert "downstream_mse" not in lines[2] and "downstream_mse" in lines[3]
    assert "local_mse" in lines[2]["places"]["blocks.1.hook_resid_pre"]
    assert "local_mse" not in lines[3]["places"]["blocks.1.hook_resid_pre"]
    apart = PlacesConfig.build({**values, "joint": False, "out": str(tmp_path / "apart")})
    alone = train_places(apart, model=model, corpora=corpora, display=False)
    one = RunConfig.build(
        {key: value for key, value in values.items() if key != "places"} | {"site": SITE, "out": str(tmp_path / "one")}
    )
    single = train(one, model=model, corpora=corpora, display=False)
    for name, own in single.sae.state_dict().items():
        assert torch.equal(own, alone.saes["blocks.1.hook_resid_pre"].state_dict()[name])


def test_the_recipe_that_is_kept_is_the_recipe(tmp_path):
    for phases in ([*PHASES[:1], {"share": 0.5}], "staged", "finetune", "horizon"):
        objective = {"kind": "e2e"} if isinstance(phases, list) else {}
        config = phased(tmp_path, phases, objective=objective)
        assert RunConfig.build(json.loads(config.model_dump_json())) == config
        assert hash(config.phases) == hash(RunConfig.build(config.model_dump()).phases)
    assert phased(tmp_path, "staged").objective_name == "local-then-horizon1-then-e2e_ds"
    assert phased(tmp_path, "horizon").objective_name == "horizon1"
    assert phased(tmp_path, "staged").objective.kind == "e2e_ds"


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ("stage", "one of the words horizon, finetune, staged"),
        ([{"share": 0.5, "objective": {"kind": "local"}}], r"must add up to 1; 0\.5 is 0\.5"),
        ([{"share": 1.5, "objective": {"kind": "local"}}], "less than or equal to 1"),
        ([{"share": 0.5, "objective": {"kind": "lokal"}}, {"share": 0.5, "objective": {"kind": "e2e"}}], "lokal"),
        (
            [{"share": 0.5, "objective": {"kind": "horizon"}}, {"share": 0.5, "objective": {"kind": "local"}}],
            "relative, absolute in the phases",
        ),
        ([{"share": 1.0, "objective": {"kind": "local"}, "rate": 1.0}], "no such key"),
        ([3], "phases"),
        (3, "phases"),
    ],
)
def test_a_phase_that_cannot_be_is_refused_in_one_line(tmp_path, phases, said):
    with pytest.raises(ConfigError, match=said):
        phased(tmp_path, phases)


def test_an_architecture_without_a_penalty_has_phases_too(model, corpora, tmp_path):
    values = phased(tmp_path / "run").model_dump(exclude_unset=True)
    values["dictionary"] = {"size": 40, "architecture": "batchtopk", "k": 4}
    with pytest.warns(UserWarning, match=r"sparsity is left out"):
        config = RunConfig.build(values)
    assert all(phase.objective.sparsity is None for phase in config.in_phases)
    assert train(config, model=model, corpora=corpora, display=False).config.objective_name == (
        "local-then-horizon1-then-e2e_ds"
    )


def test_a_plan_weighs_the_phases_by_their_tokens(made):
    values = {
        "model": {"name": str(made / "model"), "device": "cpu"},
        "data": {"context": 8},
        "site": "blocks.2.hook_resid_pre",
        "dictionary": {"ratio": 8},
        "objective": {"sparsity": {"coefficient": 1.0}},
        "training": {"tokens": 100_000},
    }
    whole = plan(RunConfig.build({**values, "phases": "staged"}))
    kinds = {
        "local": {"kind": "local"},
        "horizon1": {"kind": "horizon"},
        "e2e_ds": {"kind": "e2e_ds", "downstream_mse": 0.5, "balance": "gradient"},
    }
    alone = [
        count_flops(DryRun(config, torch.device("cpu"), config.training.batch), config.training.batch * 8)[0].per_token
        for own in kinds.values()
        for config in [RunConfig.build({**values, "objective": {**values["objective"], **own}})]
    ]
    assert [phase.kind for phase in whole.phases] == list(kinds)
    assert [phase.flops_per_token for phase in whole.phases] == pytest.approx(alone)
    shares = [phase.share for phase in whole.phases]
    assert whole.flops.per_token == pytest.approx(sum(map(operator.mul, shares, alone)))
    assert alone[0] < alone[1] < alone[2]
    assert whole.fits and whole.kind == "local-then-horizon1-then-e2e_ds"


def test_before_the_first_step_the_first_phase_is_told(model, tmp_path):
    values = {"sparsity": {"coefficient": 0.3, "p_end": 0.2, "warmup": 0.1}}
    trainee = new_trainee(phased(tmp_path, objective=values), model, 20)
    assert trainee.report()["phase"] == 1
    assert {"local_mse", "sparsity"} <= trainee.report().keys()


def test_a_loss_is_held_against_the_beginning_of_its_own_phase(tmp_path):
    """Terms of another phase have another size."""
    lines = [(1, 0.5), (1, 0.1), (2, 9.0), (2, 8.0), (10, 3.0), (2, 7.0)]
    written = [{"step": step, "loss": loss, "phase": phase} for step, (phase, loss) in enumerate(lines)]
    folder = RunFolder(tmp_path)
    folder.metrics_file.write_text("".join(f"{json.dumps(line)}\n" for line in written))
    assert folder.course() == {"first": 9.0, "last": 7.0}
    folder.metrics_file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert folder.course() == {"first": 2.0, "last": 1.0}
    folder.metrics_file.write_text("")
    assert folder.course() == {}
