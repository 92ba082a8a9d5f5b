import dataclasses
import json
import typing

import pytest

from twister_jax import config as configs
from twister_jax.config import (
    AGENTS,
    BASES,
    Config,
    complete,
    differences_from_paper,
    flat_types,
    flatten,
    from_dict,
    make_config,
    replace,
    to_dict,
    validate,
)
from twister_jax.errors import UserError


@pytest.mark.parametrize("name", BASES, ids="-".join)
def test_presets_are_valid_and_survive_json(name):
    config = BASES[name]
    validate(config)
    assert (config.agent, config.preset) == name
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_every_agent_has_every_preset():
    assert set(BASES) == {(agent, preset) for agent in AGENTS for preset in configs.PRESETS}


def test_the_paper_preset_is_the_paper():
    config = make_config("twister", "paper")
    algorithm, model = config.algorithm, config.algorithm.model
    assert (config.train.steps, config.env.frame_skip, config.env.noop_max) == (100_000, 4, 30)
    assert (algorithm.batch_size, algorithm.batch_length, algorithm.imagination_horizon) == (16, 64, 15)
    assert (model.hidden_size, model.transformer_blocks, model.attention_heads) == (512, 4, 8)
    assert (model.attention_context, model.contrastive_steps, model.dropout) == (8, 10, 0.1)
    assert (algorithm.discount, algorithm.gae_lambda, algorithm.entropy_scale) == (0.997, 0.95, 3e-4)
    assert config.evaluation.episodes == 100
    assert not config.evaluation.sample_actions
    assert "as published" in differences_from_paper(config)


def test_what_differs_from_the_paper_is_told():
    config = make_config("twister", "paper", game="Pong", **{"algorithm.batch_size": 4})
    assert differences_from_paper(config) == "differs from paper: algorithm.batch_size 4 (16)"


def test_every_setting_has_a_meaning():
    """`--help` shows the text below each field."""
    import ast
    import inspect

    documented = set()
    for node in ast.parse(inspect.getsource(configs)).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    documented.add((node.name, field.target.id))

    def check(node):
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                check(value)
            else:
                assert (type(node).__name__, field.name) in documented

    for config in BASES.values():
        check(config)


def test_every_number_has_a_range():
    for config in BASES.values():
        rules = configs._rules_for(config)
        for name, kind in flat_types(config):
            if kind in (int, float) or typing.get_origin(kind) is tuple:
                assert name in rules, name


def test_complete_fills_in_device_and_directory():
    config = make_config("twister", "cpu", seed=3)
    assert complete(config, "cpu").precision == "float32"
    assert complete(config, "gpu").precision == "bfloat16"
    assert complete(config, "cpu").logdir == "runs/twister-Breakout-cpu-seed3"
    assert complete(replace(config, {"logdir": "here"}), "cpu").logdir == "here"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.steps", 0, r"train\.steps = 0: must be at least 1"),
        ("train.steps", 100, r"train\.steps = 100: must exceed train\.prefill_steps = 163"),
        ("train.steps", "many", r"train\.steps = many: must be a whole number"),
        ("train.steps", True, "must be a whole number"),
        ("train.prefill_steps", 10, r"must be at least 64, for a window of algorithm\.batch_length = 64"),
        ("train.updates_per_step", 0.0, "must be above 0"),
        ("evaluation.episodes", 0, "must be at least 1"),
        ("env.sticky_actions", 1.0, "below 1"),
        ("seed", -1, "must be between 0 and 4294967295"),
        ("replay.capacity", 10, r"replay\.capacity = 10: must be at least 64"),
        ("algorithm.discount", 1.5, "must be above 0 and at most 1"),
        ("algorithm.discount", 0.0, "must be above 0 and at most 1"),
        ("algorithm.discount", float("nan"), "must be finite"),
        ("algorithm.return_quantiles", (0.9, 0.1), "two increasing numbers"),
        ("algorithm.return_quantiles", (0.9,), "must be 2 values"),
        ("algorithm.model.hidden_size", 500, r"divisible by .*attention_heads = 8; 496 or 504 would do"),
        ("algorithm.model.attention_heads", 0, "must be at least 1"),
        ("algorithm.model.contrastive_steps", 64, r"must exceed algorithm\.model\.contrastive_steps = 64"),
        ("algorithm.actor_optimizer.learning_rate", -1e-4, "must be above 0"),
        ("precision", "float16", r"one of auto, float32, bfloat16 \(did you mean bfloat16"),
        ("train.stepz", 3, r"unknown field train\.stepz \(did you mean train\.steps"),
        ("batch_size", 3, r"unknown field batch_size \(did you mean algorithm\.batch_size"),
        ("env", 3, "unknown field env"),
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
        (lambda d: d.update(agent="dqn"), "agent = dqn: must be one of"),
        (lambda d: d.update(env=3), "field env"),
    ],
)
def test_a_foreign_config_json_is_refused(change, message):
    data = json.loads(json.dumps(to_dict(Config())))
    change(data)
    with pytest.raises(UserError, match=message):
        from_dict(data, "runs/x/config.json")


def test_flatten_names_every_setting_once():
    names = [name for name, _ in flatten(Config())]
    assert len(names) == len(set(names))
    assert dict(flat_types(Config())).keys() == set(names)
