"""Records of denoisings: against a trajectory by hand, and confidences against the likelihood's and the sampler's own numbers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpo_jax import denoisings
from diffpo_jax.build import Grades
from diffpo_jax.likelihood import all_cuts, surrogate_log_probs
from diffpo_jax.models.transformer import ModelConfig, Policy
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.structs import Prompts, ThresholdDraw, Trajectory
from diffpo_jax.tokenizer import CharTokenizer

LENGTH = 5


@pytest.fixture(scope="module")
def drawn():
    """(policy, params, a trajectory of three rows drawn at temperature 1, two positions a call)."""
    policy = Policy(ModelConfig(vocab_size=6, mask_id=5, width=16, layers=1, heads=2, kv_heads=2, mlp_width=16))
    params = jax.tree.map(lambda x: 3 * x, policy.init(jax.random.key(0)))
    prompt = jnp.array([[1, 1], [2, 3], [0, 4]])
    options = dict(length=LENGTH, rule="entropy_bounded", threshold=jnp.array([0.1, 1.0, 3.0]))
    return policy, params, denoise(policy, params, prompt, prompt > 0, jax.random.key(2), **options)


def test_confidences_are_the_probabilities_that_were_drawn_with(drawn):
    policy, params, trajectory = drawn
    found = denoisings.confidences(policy, params, trajectory)
    assert len(set(np.asarray(trajectory.nfe).tolist())) > 1 and found.min() < 0.9  # rows of several lengths, values that say something
    np.testing.assert_allclose(found, np.exp(trajectory.log_prob), rtol=1e-4)
    exact = surrogate_log_probs(policy, params, trajectory, all_cuts(trajectory.nfe, LENGTH))
    np.testing.assert_allclose(found, np.exp(exact), rtol=1e-4)


def make_parts(rule="entropy_bounded", early_stop=True):
    sampler = SimpleNamespace(rule=rule, eos_early_stop=early_stop)
    return SimpleNamespace(tokenizer=CharTokenizer("abc=12"), config=SimpleNamespace(sampler=sampler))


def by_hand(draw=None):
    # characters in order: 1 2 = a b c are 3 4 5 6 7 8; the second row ends after two tokens, what is behind was filled in or drawn
    return Trajectory(
        prompts=Prompts(np.array([[0, 6, 7], [8, 5, 3]]), np.array([[False, True, True], [True, True, True]])),
        tokens=np.array([[6, 5, 3, 4], [7, 1, 1, 1]]),
        unmask_step=np.array([[0, 1, 2, 0], [1, 1, 0, 1]]),
        log_prob=np.zeros((2, 4)),
        entropy=np.array([[0.5, 0.25, 0.0, 1.23456], [0.1, 0.2, 0.3, 0.0]]),
        nfe=np.array([3, 2]),
        draw=draw,
    )


CONFIDENCE = np.array([[0.9, 0.8, 0.98765, 0.6], [0.5, 0.4, 0.3, 0.2]])


def test_records_by_hand():
    draw = ThresholdDraw(np.array([1.25, 0.5]), *[None] * 3)
    grades = Grades(np.array([1.0, 0.25]), np.array([1.0, 0.0]), {})
    first, second = denoisings.to_records(make_parts(), by_hand(draw), CONFIDENCE, grades)
    assert first == {
        "prompt": "ab", "answer": "a=12", "tokens": ["a", "=", "1", "2"], "steps": [0, 1, 2, 0], "confidence": [0.9, 0.8, 0.9877, 0.6],
        "entropy": [0.5, 0.25, 0.0, 1.235], "nfe": 3, "gamma": 1.25, "reward": 1.0, "correct": True,
    }  # fmt: skip
    assert (second["prompt"], second["answer"], second["tokens"]) == ("c=1", "b", ["b", "·", "·", "·"])
    # the last EOS was filled in; the first ends the response, and the one between was drawn a step earlier
    assert second["confidence"] == [0.5, 0.4, 0.3, None] and second["entropy"] == [0.1, 0.2, 0.3, None]
    assert (second["gamma"], second["reward"], second["correct"]) == (0.5, 0.25, False)


def test_what_a_record_does_not_know_is_none():
    [record, _] = denoisings.to_records(make_parts("margin"), by_hand(), CONFIDENCE, threshold=0.5)
    assert (record["gamma"], record["reward"], record["correct"]) == (None, None, None)
    [record, _] = denoisings.to_records(make_parts(), by_hand(), CONFIDENCE, threshold=0.5)
    assert record["gamma"] == 0.5
    _, record = denoisings.to_records(make_parts(early_stop=False), by_hand(), CONFIDENCE)
    assert record["confidence"] == [0.5, 0.4, 0.3, 0.2]  # nothing is filled in where rows run to their end


def test_rows_that_both_meshes_split():
    meshes = [SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 1}), SimpleNamespace(shape={"data": 1, "fsdp": 6, "tensor": 1})]
    parts = SimpleNamespace(mesh=meshes[0], rollout_mesh=meshes[1])
    assert [denoisings.whole_rows(parts, rows) for rows in (1, 12, 13)] == [12, 12, 24]
