"""A published or exported policy as a model of EleutherAI's lm-eval, whose generative tasks then run unchanged.

    pip install "diffpo_jax[lm-eval]"
    python -m diffpo_jax.lm_eval --model diffpo_jax --model_args pretrained=DIR,length=256 --batch_size 16 --tasks gsm8k

takes the command line of lm-eval (`--limit`, `--num_fewshot`, `--output_path`, ...); from Python, import this module and call
`lm_eval.simple_evaluate(model="diffpo_jax", ...)`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from diffpo_jax import command_line, sharding
from diffpo_jax.models.pretrained import load_pretrained, read_config, read_special_ids, resolve
from diffpo_jax.models.transformer import Policy
from diffpo_jax.sampling.denoise import CACHES, denoise
from diffpo_jax.sampling.unmasking import RULES, TOP_K_RULES
from diffpo_jax.structs import Prompts
from diffpo_jax.tokenizer import HuggingFaceTokenizer, load_fast, load_tokenizer

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError('the adapter needs lm-eval: pip install "diffpo_jax[lm-eval]"') from error

PROMPT_MULTIPLE = 64  # prompts are padded to a multiple of this many tokens, so that few lengths are compiled


@register_model("diffpo_jax")
class DiffpoLM(LM):
    """Generates greedily with the denoising sampler; gives no likelihoods."""

    def __init__(
        self,
        pretrained: str | tuple[Policy, Any, Any],
        length: int = 256,
        block_length: int = 32,
        rule: str = "low_confidence",
        threshold: float = 0.5,
        steps: int = 0,
        cache: str = "none",
        refresh: int = 0,
        batch_size: int | str = 1,
        chat: bool = True,
        tokenizer: str = "",
        dtype: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """Loads the model.

        Args:
          pretrained: a folder in Hugging Face's layout or a hub name; or (policy, params, tokenizer).
          length: response tokens; a task's `max_gen_toks` shortens the response where it is less.
          block_length, rule, threshold: as of `denoise`.
          steps: likewise; 0 = two tokens a step.
          cache, refresh: likewise.
          batch_size: rows per call of the sampler, a multiple of the number of devices.
          chat: each context becomes one user turn of the model's chat template. False: it is taken as it is, special tokens included: for
            base models, and with lm-eval's --apply_chat_template, which writes the template itself.
          tokenizer: its folder; "" = the model's own.
          dtype: of the parameters: float32 | bfloat16; None = as stored.
          device: not read: lm-eval names one ("cuda:0") even where none was asked for. JAX chooses the devices (JAX_PLATFORMS).
          max_batch_size: lm-eval hands it to every model; it must be None.

        Raises:
          FileNotFoundError, ValueError: as `load_pretrained`, `load_tokenizer` and `denoise`; or an argument that is not served.
        """
        super().__init__()
        del device
        if max_batch_size is not None or not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size = {batch_size!r}, max_batch_size = {max_batch_size!r}: give a number of rows as --batch_size")
        if rule not in RULES:
            raise ValueError(f"rule {rule!r} is unknown; known: {', '.join(RULES)}")
        if cache not in CACHES:
            raise ValueError(f"cache {cache!r} is unknown; known: {', '.join(CACHES)}")
        self.mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
        self.chat, self.batch_rows = chat, int(batch_size)
        sharding.check_divides("batch_size", self.batch_rows, self.mesh)
        steps = steps or (length // 2 if rule in TOP_K_RULES else 0)
        self.options: dict[str, Any] = {"length": length, "block_length": block_length, "rule": rule, "threshold": threshold}
        self.options |= {"steps": steps, "cache": cache, "refresh": refresh}
        self.folder = None
        if isinstance(pretrained, str):
            self.folder = Path(tokenizer or resolve(pretrained))
            pretrained = _load(pretrained, self.folder, dtype, self.mesh)
        self.tokenizer: Any
        self.policy, self.params, self.tokenizer = pretrained
        self.nfe: list[int] = []  # denoiser calls of each response so far

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A response to each request, in their order, cut before the first stop string; see `LM.generate_until`.

        Raises:
          ValueError: a request asks for sampling.
        """
        if not requests:
            return []
        contexts, stops, limits = zip(*map(self._read, requests), strict=True)
        order = sorted(range(len(requests)), key=lambda i: -len(contexts[i]))  # the longest first: what does not fit shows at once
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="denoising") as bar:
            for start in range(0, len(order), self.batch_rows):
                numbers = order[start : start + self.batch_rows]
                for number, tokens in zip(numbers, self._denoise([contexts[i] for i in numbers], numbers), strict=True):
                    texts[number] = cut(self.tokenizer.decode(tokens[: limits[number]]), stops[number])
                    self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                bar.update(len(numbers))
        return texts

    def _read(self, request: Any) -> tuple[list[int], list[str], int]:
        """(prompt ids, stop strings, most response tokens) of a request."""
        context, wanted = request.args
        if wanted.get("do_sample") and wanted.get("temperature", 1.0) > 0:
            raise ValueError(f"diffpo_jax decodes greedily, but a task asks for sampling: {wanted}; give --gen_kwargs do_sample=False")
        stops = wanted.get("until") or []
        return self._encode(context), [stops] if isinstance(stops, str) else list(stops), wanted.get("max_gen_toks", self.options["length"])

    def _encode(self, context: str) -> list[int]:
        if self.chat:
            return self.tokenizer.encode_prompt(context)
        if isinstance(self.tokenizer, HuggingFaceTokenizer):  # its own `encode` makes plain text of special tokens
            return self.tokenizer.full.encode(context, add_special_tokens=False).ids
        return self.tokenizer.encode(context)

    def _denoise(self, contexts: Sequence[list[int]], numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields the response tokens [L] to each of up to `batch_size` contexts; `numbers` are their requests'."""
        width = -(-max(1, *map(len, contexts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        prompt = np.full((self.batch_rows, width), self.tokenizer.pad_id, np.int32)
        mask = np.zeros(prompt.shape, bool)
        for row in range(self.batch_rows):  # rows beyond the last context repeat it
            ids = contexts[min(row, len(contexts) - 1)]
            prompt[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
        row_ids = np.resize(np.asarray(numbers, np.int32), self.batch_rows)
        prompts, row_ids = sharding.put_rows(self.mesh, (Prompts(prompt, mask), row_ids), self.batch_rows)
        trajectory = denoise(
            self.policy, self.params, prompts.tokens, prompts.mask, jax.random.key(0), eos_id=self.tokenizer.eos_id, temperature=0.0,
            row_ids=row_ids, **self.options,
        )  # fmt: skip
        tokens, nfe = jax.device_get((trajectory.tokens, trajectory.nfe))
        self.nfe += nfe[: len(contexts)].tolist()
        yield from tokens[: len(contexts)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the model's template writes it; only with chat=False, where the template is not applied a second time."""
        if self.chat:
            raise ValueError("diffpo_jax applies the chat template itself; with --apply_chat_template add chat=False to --model_args")
        if self.folder is None:
            raise ValueError("--apply_chat_template needs the folder of a tokenizer: give `pretrained` or `tokenizer` as a path")
        return self._published.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    @functools.cached_property
    def _published(self) -> Any:
        return load_fast(str(self.folder))

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches of requests."""
        return str(self.folder)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the configuration of its results: the sampler's settings, and the mean denoiser calls of a response."""
        return {"sampler": self.options, "mean_nfe": float(np.mean(self.nfe)) if self.nfe else None}

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "a masked diffusion model has no exact likelihood of a text that is cheap to compute, and bounds on it cannot be compared with "
            "the likelihoods of other models: use the generative variant of the task (output_type generate_until)"
        )

    loglikelihood_rolling = loglikelihood


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` before the first occurrence of any stop string; empty ones stop nothing."""
    return text[: min((at for at in map(text.find, filter(None, stops)) if at >= 0), default=len(text))]


def _load(pretrained: str, folder: Path, dtype: str | None, mesh: Any) -> tuple[Policy, Any, HuggingFaceTokenizer]:
    """(policy, params, tokenizer) of a model's folder or hub name, and the folder of its tokenizer."""
    sharding.check_model(read_config(pretrained), mesh)
    policy, params = load_pretrained(pretrained, dtype, functools.partial(sharding.param_sharding, mesh))
    policy = dataclasses.replace(policy, layout=sharding.Layout(mesh))
    config, special = policy.config, read_special_ids(pretrained)
    return policy, params, load_tokenizer(str(folder), mask_id=config.mask_id, vocab_size=config.vocab_size, **special)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    with command_line.errors_said():
        cli_evaluate()
