"""Presets, validation, and config.json."""

import dataclasses
import json
import typing

import pytest

from twister_jax import agents, envs
from twister_jax.agents.twister.config import TwisterConfig
from twister_jax.envs.atari import AtariConfig
from twister_jax.errors import UserError
from twister_jax.fields import describe, flatten, meaning, replace
from twister_jax.presets import complete, differences_from_paper, from_dict, make_config, validate
from twister_jax.runtime import tracing_for

EVERY = [
    (agent, preset, game)
    for agent in agents.AGENTS
    for preset in ("paper", "cpu", "debug")
    for game in ("Pong", "Catch")
]


@pytest.mark.parametrize("name", EVERY, ids="-".join)
def test_presets_are_valid_and_survive_json(name):
    config = make_config(*name)
    validate(config)
    assert (config.agent, config.preset, config.game) == name
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("agent", agents.AGENTS)
def test_the_paper_preset_is_the_paper_in_float32_alone(agent):
    config = make_config(agent, "paper")
    assert differences_from_paper(config) == "settings: as published (paper)"
    assert differences_from_paper(complete(config)) == "settings: as published (paper)"
    with tracing_for("gpu"):
        assert differences_from_paper(complete(config)) == "differs from paper: precision bfloat16 (float32)"


def test_a_suite_and_an_agent_add_to_a_preset():
    """The suite's settings come over the agent's, and what an agent has for a suite over both."""
    assert make_config(preset="cpu", game="Catch").train.steps == 1_600
    continuous = make_config(preset="cpu", game="ContinuousCatch")
    assert (continuous.train.steps, continuous.algorithm.batch_size) == (7_000, 4)
    assert continuous.algorithm.actor_optimizer.learning_rate == 3e-4  # its own, over the suite's
    assert continuous.algorithm.critic_optimizer.learning_rate == 6e-4
    assert make_config("twm", "cpu", "Catch").train.steps == 3_000
    assert make_config(preset="cpu", game="Pong").env.evaluation_time_limit_frames == 18_000
    atari = make_config("twm", "paper", "Pong").env
    assert (atari.grayscale, atari.life_loss_ends_episode, atari.fire_start) == (True, True, True)
    assert make_config("twm", "paper", "Catch").env.grayscale


def test_what_differs_from_the_paper_is_told():
    config = make_config("twister", "paper", game="Pong", **{"algorithm.batch_size": 4})
    assert differences_from_paper(config) == "differs from paper: algorithm.batch_size 4 (16)"


@pytest.mark.parametrize(
    "name", [("twister", "paper", "Pong"), ("twm", "paper", "Pong"), ("twister", "cpu", "Catch")]
)
def test_every_setting_has_a_meaning_and_every_number_a_range(name):
    config = make_config(*name)
    for field, described in describe(config).items():
        assert meaning(config, field), field
        number = described.kind in (int, float) or typing.get_origin(described.kind) is tuple
        assert described.range is not None or not number, field


def test_complete_fills_in_device_and_directory():
    config = make_config("twister", "cpu", seed=3)
    assert complete(config).precision == "float32"
    with tracing_for("gpu"):
        assert complete(config).precision == "bfloat16"
    assert complete(config).logdir == "runs/twister-Breakout-cpu-seed3"
    assert complete(replace(config, {"logdir": "here"})).logdir == "here"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.steps", 0, r"train\.steps = 0: must be between 1 and"),
        ("train.steps", 100, r"train\.steps = 100: must exceed train\.prefill_steps = 163"),
        ("train.steps", "many", r"train\.steps = many: must be a whole number"),
        ("train.steps", True, "must be a whole number"),
        ("train.prefill_steps", 10, r"must be at least 64, for a window of algorithm\.batch_length = 64"),
        ("train.updates_per_step", 0.0, "must be above 0"),
        ("evaluation.episodes", 0, "must be between 1 and"),
        ("env.sticky_actions", 1.0, "below 1"),
        ("seed", -1, "must be between 0 and 4294967295"),
        ("replay.capacity", 10, r"replay\.capacity = 10: must be at least 64"),
        ("algorithm.discount", 1.5, "must be above 0 and at most 1"),
        ("algorithm.discount", 0.0, "must be above 0 and at most 1"),
        ("algorithm.discount", float("nan"), "must be finite"),
        ("algorithm.return_quantiles", (0.9, 0.1), "two increasing numbers"),
        ("algorithm.return_quantiles", (0.9,), "must be 2 values"),
        ("algorithm.model.hidden_size", 500, r"divisible by .*attention_heads = 8; 496 or 504 would do"),
        ("algorithm.model.attention_heads", 0, "must be between 1 and"),
        ("algorithm.model.contrastive_steps", 64, r"must exceed algorithm\.model\.contrastive_steps = 64"),
        ("algorithm.actor_optimizer.learning_rate", -1e-4, "must be above 0"),
        ("precision", "float16", r"one of auto, float32, bfloat16 \(did you mean bfloat16"),
        ("train.stepz", 3, r"unknown field train\.stepz \(did you mean train\.steps"),
        ("batch_size", 3, r"unknown field batch_size \(did you mean algorithm\.batch_size"),
        ("env", 3, "unknown field env"),
        ("train.steps", 10**10, "must be between 1 and 1000000000"),
        ("env.noop_max", 10**19, "must be between 0 and 100000"),
    ],
)
def test_what_cannot_work_is_refused_with_field_and_fix(field, value, message):
    with pytest.raises(UserError, match=message) as caught:
        validate(make_config("twister", "paper", **{field: value}))
    assert "\n" not in str(caught.value)


def test_twm_imagines_from_no_more_steps_than_a_batch_has():
    message = r"imagination_batch = 400: must be at most algorithm\.batch_size x algorithm\.batch_length = 64"
    with pytest.raises(UserError, match=message):
        validate(make_config("twm", "paper", **{"algorithm.batch_size": 4}))


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError, match=r"env\.num_envs.*train\.steps"):
        validate(make_config("twister", "paper", **{"env.num_envs": 0, "train.steps": 0}))


def test_settings_of_another_agent_are_refused():
    with pytest.raises(UserError, match="another agent"):
        validate(dataclasses.replace(make_config("twister"), agent="twm"))


def test_names_are_matched_closely():
    with pytest.raises(UserError, match=r"unknown agent 'twistr' \(did you mean twister\?\)"):
        make_config("twistr")
    with pytest.raises(UserError, match=r"unknown preset 'debgu' \(did you mean debug\?\)"):
        make_config("twister", "debgu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["train"].update(stepz=1), r"unknown field train\.stepz \(did you mean train\.steps"),
        (lambda d: d["train"].pop("steps"), r"field train\.steps is missing"),
        (lambda d: d.update(seed="0"), r"seed = .*0.*: must be a whole number"),
        (lambda d: d.update(agent="dqn"), "unknown agent .dqn.; one of"),
        (lambda d: d.update(env=3), "field env"),
    ],
)
def test_a_foreign_config_json_is_refused(change, message):
    data = json.loads(json.dumps(make_config().to_dict()))
    change(data)
    with pytest.raises(UserError, match=message):
        from_dict(data, "runs/x/config.json")


def test_flatten_names_every_setting_once():
    names = [name for name, _ in flatten(make_config())]
    assert len(names) == len(set(names))
    assert describe(make_config()).keys() == set(names)


def test_what_a_resumed_run_may_change_is_marked():
    changeable = {name for name, field in describe(make_config()).items() if field.changeable}
    assert {"train.steps", "logdir", "evaluation.episodes", "env.evaluation_noop_max"} <= changeable
    assert not changeable & {
        "seed",
        "game",
        "agent",
        "env.noop_max",
        "algorithm.discount",
        "train.prefill_steps",
    }


def test_the_registries_name_what_they_have():
    assert envs.suite("atari").settings == AtariConfig()
    assert isinstance(agents.package("twister").presets["paper"].algorithm, TwisterConfig)
    with pytest.raises(UserError, match=r"unknown suite 'atary' \(did you mean atari"):
        envs.suite("atary")
