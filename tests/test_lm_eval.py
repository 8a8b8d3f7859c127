"""The policy as a model of lm-eval: its responses against the sampler called by hand, and a task of lm-eval run on it."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the optional extra lm-eval is not installed")

from diffpo_jax.lm_eval import DiffpoLM, cut
from diffpo_jax.models.pretrained import load_pretrained
from diffpo_jax.models.transformer import ModelConfig, Policy
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.tokenizer import CharTokenizer, load_tokenizer
from tests.published_model import ASSISTANT, EOS, MASK, USER, write_model

TOKENIZER = CharTokenizer("abcd")
POLICY = Policy(ModelConfig(vocab_size=7, mask_id=2, width=16, layers=1, heads=2, kv_heads=2, mlp_width=16))
RNG = np.random.default_rng(2)  # large weights: the prompts get different responses
PARAMS = jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), jax.eval_shape(POLICY.init, jax.random.key(0)))
CONTEXTS = ["ab", "c", "dddddda", "bbb", "adbc"]
SIZES = {"length": 8, "block_length": 4}


def model(**arguments):
    return DiffpoLM(pretrained=(POLICY, PARAMS, TOKENIZER), **SIZES | arguments)


def request(context, **wanted):
    return SimpleNamespace(args=(context, wanted))


def by_hand(policy, params, ids, eos_id, **options):
    """(response tokens, calls) to one prompt alone, with padding before it."""
    prompt = np.array([[0] * (40 - len(ids)) + ids], np.int32)
    mask = np.arange(40)[None] >= 40 - len(ids)
    trajectory = denoise(policy, params, prompt, mask, jax.random.key(9), eos_id=eos_id, temperature=0.0, **SIZES | options)
    return trajectory.tokens[0].tolist(), int(trajectory.nfe[0])


RULES = {
    "two tokens a step": ({}, {"rule": "low_confidence", "steps": 4}),
    "steps": ({"steps": 8, "rule": "margin"}, {"steps": 8, "rule": "margin"}),
    "threshold": ({"rule": "entropy_bounded", "threshold": 1.2}, {"rule": "entropy_bounded", "threshold": 1.2}),
}


@pytest.mark.parametrize("name", RULES)
def test_responses_are_the_samplers_in_the_order_of_the_requests(name):
    arguments, options = RULES[name]
    lm = model(batch_size="2", device="cuda:0", max_batch_size=None, **arguments)  # as the command line hands them over
    expected = [by_hand(POLICY, PARAMS, TOKENIZER.encode(context), 1, **options) for context in CONTEXTS]
    texts = lm.generate_until([request(context, until=[]) for context in CONTEXTS], disable_tqdm=True)
    assert texts == [TOKENIZER.decode(tokens) for tokens, _ in expected]
    assert len(set(texts)) > 3
    assert lm.get_model_info()["mean_nfe"] == np.mean([nfe for _, nfe in expected])
    assert lm.generate_until([]) == []


@pytest.mark.parametrize(
    ("stops", "text"),
    [(["b"], "aac"), (["d", "b"], "aac"), (["d", "b", "a"], ""), (["bd", "cb"], "aa"), (["", "x"], "aacbda"), ([], "aacbda")],
)
def test_text_is_cut_before_the_first_stop_string(stops, text):
    assert cut("aacbda", stops) == text


def test_stop_strings_and_the_tasks_limit():
    lm = model(batch_size=1)
    (whole,) = lm.generate_until([request("bbb")])
    start = whole.rstrip(whole[-1])
    assert start and len(whole) == 8  # "aabbbbbb", so that both have something to cut
    assert lm.generate_until([request("bbb", until=whole[-1])]) == [start]
    for limit in (3, 8, 500):
        assert lm.generate_until([request("bbb", max_gen_toks=limit)]) == [whole[:limit]]


def test_what_is_not_served_is_refused():
    greedy = {"do_sample": False, "temperature": 0.7}
    model().generate_until([request("ab", **greedy), request("ab", do_sample=True, temperature=0)])
    with pytest.raises(ValueError, match="decodes greedily"):
        model().generate_until([request("ab", do_sample=True, temperature=0.7)])
    for method in ("loglikelihood", "loglikelihood_rolling"):
        with pytest.raises(NotImplementedError, match="generate_until"):
            getattr(model(), method)([request("ab")])
    for arguments, message in (
        ({"batch_size": "auto"}, "batch_size = 'auto'"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"rule": "best"}, "rule 'best' is unknown; known: low_confidence"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    with pytest.raises(ValueError, match="not a multiple of block_length = 3"):
        model(block_length=3).generate_until([request("ab")])


# --- a folder in the published layout ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llada"))


def expected_text(folder, ids):
    policy, params = load_pretrained(str(folder))
    tokenizer = load_tokenizer(str(folder), mask_id=MASK, eos_id=EOS, pad_id=EOS, vocab_size=264)
    return tokenizer.decode(by_hand(policy, params, ids, EOS, rule="low_confidence", steps=4)[0])


def in_bytes(folder, text):
    return load_tokenizer(str(folder), mask_id=MASK, eos_id=EOS, pad_id=EOS, vocab_size=264).encode(text)


def test_the_chat_template_is_applied_once(folder):
    lm = DiffpoLM(pretrained=str(folder), **SIZES)
    expected = expected_text(folder, [USER, *in_bytes(folder, "ab?"), ASSISTANT])
    assert lm.generate_until([request("ab?")]) == [expected]
    assert lm._encode("<|mask|>") == [USER, *in_bytes(folder, "<|mask|>"), ASSISTANT]  # what a problem says is text
    with pytest.raises(ValueError, match="chat=False"):
        lm.apply_chat_template([{"role": "user", "content": "ab?"}])


def test_with_the_template_of_lm_eval_contexts_are_taken_as_they_are(folder):
    lm = DiffpoLM(pretrained=str(folder), chat=False, **SIZES)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    context = lm.apply_chat_template(turns)
    assert context == "<|user|>a<|assistant|>b<|user|>c<|assistant|>"
    assert lm.apply_chat_template(turns[:2], add_generation_prompt=False) == "<|user|>a<|assistant|>b"  # to be continued
    a, b, c = (in_bytes(folder, letter) for letter in "abc")
    assert lm._encode(context) == [USER, *a, ASSISTANT, *b, USER, *c, ASSISTANT]
    assert lm._encode("a") == a
    assert lm.tokenizer_name == str(folder)
    assert model(chat=False)._encode("ab") == [3, 4]
    with pytest.raises(ValueError, match="give `pretrained` or `tokenizer` as a path"):
        model(chat=False).apply_chat_template(turns)


def test_the_special_ids_must_be_published(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    published = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published | {"eos_token_id": [256, 259]}))
    with pytest.raises(ValueError, match=r"config.json must give eos_token_id and pad_token_id as numbers; it has \[256, 259\] and 256"):
        DiffpoLM(pretrained=str(tmp_path), **SIZES)


@pytest.mark.slow
def test_a_task_of_lm_eval(folder, monkeypatch):
    """Two of the three answers are what the model says, cut before the stop string."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = {question: expected_text(folder, [USER, *in_bytes(folder, f"Q: {question}"), ASSISTANT]) for question in ("1", "2", "3")}
    stop = texts["1"][3]
    answers = {"1": cut(texts["1"], [stop]), "2": cut(texts["2"], [stop]), "3": "something else"}
    task = {
        "task": "letters",
        "custom_dataset": lambda **_: {
            "test": datasets.Dataset.from_list([{"question": question, "answer": answer} for question, answer in answers.items()])
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [stop], "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    arguments = f"pretrained={folder},length=8,block_length=4"
    results = lm_eval.simple_evaluate(
        model="diffpo_jax", model_args=arguments, tasks=[task], batch_size=2, bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # reading lm-eval's own tasks takes seconds
    )  # fmt: skip
    assert results["results"]["letters"]["exact_match,none"] == pytest.approx(2 / 3)
    said = [sample["resps"][0][0] for sample in sorted(results["samples"]["letters"], key=lambda sample: sample["doc_id"])]
    assert said == [cut(text, [stop]) for text in texts.values()]
    assert results["config"]["mean_nfe"] >= 2 and results["config"]["sampler"]["steps"] == 4
