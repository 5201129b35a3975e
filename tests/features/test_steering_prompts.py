"""`endwise steer`: two continuations and the KL between them, against whole passes of the model with a plain hook."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from endwise import SAE, Ablate, Keep, Steer, load_model
from endwise.cli import app
from endwise.common.errors import ConfigError
from endwise.config.run import DataConfig
from endwise.features.harvest.results import read_harvest
from endwise.features.steering import Sampling, opened, steer
from made_harvests import write_harvested_run
from small_gpt2 import SITE

pytestmark = pytest.mark.usefixtures("loaded_once")

PROMPT = "How to bake a cake:\nMix the"


@pytest.fixture(scope="module")
def embedded():
    return load_model()


@pytest.fixture(scope="module")
def run(tmp_path_factory, embedded):
    return write_harvested_run(tmp_path_factory.mktemp("steered") / "run", 60, width=embedded.width(SITE))


def hooked_logits(model, ids, change):
    """Logits after each position of a whole pass, of which a plain hook changes the site."""

    def act(_module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        return ((change(x), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": change(x)})

    handle = model.model.transformer.h[1].register_forward_pre_hook(act, with_kwargs=True)
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).logits[0]
    handle.remove()
    return logits


def likeliest(model, ids, change, count):
    for _ in range(count):
        ids = [*ids, hooked_logits(model, ids, change)[-1].argmax().item()]
    return ids


@pytest.mark.parametrize(("positions", "bos"), [("all", False), ("all", True), ("generated", False), ("last", True)])
def test_texts_and_kl_are_those_of_whole_passes(run, embedded, positions, bos):
    found = opened(run, model=embedded)
    data = DataConfig(prepend_bos=bos)
    if bos:
        embedded.tokenizer.bos_token_id = 0
    ids = [0] * bos + embedded.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    length, direction = len(ids), SAE.load(run).W_dec[3]
    where = {"all": slice(int(bos), None), "generated": slice(length, None), "last": slice(length - 1, length)}[
        positions
    ]

    def change(x):
        changed = x.clone()
        changed[:, where] += 6 * direction
        return changed

    made = steer(
        embedded, {SITE: found.sae}, [Steer(3, 6)], PROMPT, data=data, positions=positions, sampling=Sampling(8)
    )
    clean, steered = likeliest(embedded, ids, torch.clone, 8), likeliest(embedded, ids, change, 8)
    decode = embedded.tokenizer.decode
    assert "".join([*made.prompt, *made.clean]) == decode(clean)
    assert "".join([*made.prompt, *made.steered]) == decode(steered)
    assert len(made.clean) == len(made.steered) == 8
    p, q = (hooked_logits(embedded, clean, act).log_softmax(-1) for act in (torch.clone, change))
    kl = (p.exp() * (p - q)).sum(-1)[:-1]
    assert list(made.kls) == pytest.approx(kl.tolist(), rel=2e-3, abs=1e-6)
    assert made.kl == pytest.approx(kl[length - 1 :].mean().item(), rel=2e-3, abs=1e-6)
    assert made.kl_in_prompt == pytest.approx(kl[: length - 1].mean().item(), rel=2e-3, abs=1e-6)
    assert made.kl > 0.01


def test_what_is_drawn_depends_on_the_seed_and_the_edits_alone(run, embedded):
    found = opened(run, model=embedded)

    def texts(edits, **drawn):
        before = torch.get_rng_state()
        made = steer(embedded, {SITE: found.sae}, edits, PROMPT, sampling=Sampling(12, 1.0, **drawn))
        assert torch.equal(torch.get_rng_state(), before)
        return made

    nothing = Steer(3, 0.0)
    assert texts([nothing]).clean == texts([nothing]).steered
    assert texts([nothing]).kl == 0
    assert texts([nothing], seed=1).clean == texts([Keep(3)], seed=1).clean != texts([nothing], seed=2).clean
    assert texts([Steer(3, 9.0)]).steered != texts([Steer(3, 9.0)]).clean


def call(*arguments):
    return CliRunner().invoke(app, ["steer", *map(str, arguments)])


def test_the_command_says_what_the_function_finds(run, embedded):
    found = opened(run)
    harvest = read_harvest(run)
    edits = [Keep([0, 5, 1, 2]), Ablate([5, 2]), Steer(0, 1.5, relative_to=harvest), Steer(1, -2, relative_to=harvest)]
    sampling = Sampling(10, 0.5, 4)
    made = steer(
        found.model, {found.place: found.sae}, edits, PROMPT, error="drop", positions=slice(2, None), sampling=sampling
    )
    asked = (run, "--prompt", PROMPT, "--feature", 0, "--by", 1.5, "--feature", 1, "--by=-2", "--of-max", "--keep")
    asked += ("0,5,1,2", "--ablate", "5,2", "--error", "drop", "--positions", "2:", "--tokens", 10)
    asked += ("--temperature", 0.5, "--seed", 4)
    said = json.loads(call(*asked, "--json").stdout)
    assert said == {"place": SITE, **made.to_json()}
    shown = call(*asked)
    assert shown.stderr.strip() == "! Feature 2 never fired on the text that was harvested."
    shown = shown.stdout
    assert "clean" in shown and "steered" in shown and f"{made.kl:.4g} nats, mean over the predictions" in shown
    words = shown.split()
    assert set("".join(made.clean).split()) <= set(words) and set("".join(made.steered).split()) <= set(words)


def test_an_sae_that_is_no_run_needs_no_text_to_measure_on(run, embedded, tmp_path):
    sae = SAE.load(run)
    sae.save(tmp_path / "bare")
    options = ("--prompt", PROMPT, "--clamp", "3=6", "--tokens", 3, "--json")
    said = call(tmp_path / "bare", *options, "--model", "embedded", "--site", SITE)
    expected = json.loads(call(run, *options).stdout)
    assert json.loads(said.stdout) == expected
    failed = call(tmp_path / "bare", *options)
    assert failed.exit_code == 2 and "Give one with --model" in failed.stderr
    failed = call(run, *options, "--model", "embedded")
    assert failed.exit_code == 2 and "Leave --model" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "Nothing to change"),
        (("--feature", 3), "one for each; given 0 for 1"),
        (("--by", 3), "given 1 for 0"),
        (("--feature", 2, "--by", 1, "--of-max"), "feature 2 never fired"),
        (("--clamp", "3:8"), "FEATURE=VALUE"),
        (("--keep", "3-8"), "as 7 or 7,9,30"),
        (("--ablate", 3, "--positions", "everywhere"), "positions are all, prompt, last"),
        (("--ablate", 3, "--error", "lose"), "keep or drop"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_in_one_line(run, arguments, told):
    prompt = () if "--prompt" in arguments else ("--prompt", PROMPT)
    failed = call(run, *prompt, *arguments)
    assert failed.exit_code == 2, failed.output
    assert told in failed.stderr and failed.stderr.startswith(("endwise: ", "! Feature")) and not failed.stdout


def test_prompts_and_samplings_that_are_none(run, embedded):
    for tokens, temperature in ((0, 0.0), (1, -1.0), (1, math.nan), (1, math.inf)):
        with pytest.raises(ConfigError, match=r"token|temperature"):
            Sampling(tokens, temperature)
    saes = {SITE: opened(run, model=embedded).sae}
    for prompt, sampling, told in (("", Sampling(), "empty"), (PROMPT, Sampling(255), r"more than 1\. Shorten")):
        with pytest.raises(ConfigError, match=told):
            steer(embedded, saes, [Ablate(3)], prompt, sampling=sampling)
