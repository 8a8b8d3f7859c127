"""Every field of a run, once, with its meaning and unit.

`configs/{math,countdown,sudoku}.py:PRESET` start from here and change what a task or a preset needs. Any field can be overridden on
the command line: `--config.rl.group_size=16`. An unknown field or an unknown name for a choice is an error that lists the known ones.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from diffpo_jax.algorithms import ALGORITHMS


def get_config() -> ConfigDict:
    """The defaults: the `tiny` preset's model and algorithm, without a task."""
    c = ConfigDict()
    c.algorithm = ""  # a key of diffpo_jax.ALGORITHMS, whose fields it sets, where the command line does not; "" = as the fields say
    c.seed = 0  # root of every random number of the run, except the data set's (task.seed)

    c.task = task = ConfigDict()
    task.name = "sudoku"  # problems, prompt text, verifier: a key of diffpo_jax.TASKS
    task.seed = 0  # seed of the generated data set; independent of `seed` so that runs over seeds share one test set
    task.train_size = 20_000  # problems in the training split
    task.test_size = 512  # problems in the test split, disjoint from training (each task says in what sense)
    task.prompt_length = 16  # tokens; prompts are left-padded to this; a longer one is an error
    task.response_length = 16  # tokens the denoiser fills in (L); the demonstration is padded with EOS
    task.dense_reward = True  # train on the task's partial-credit reward; False = right or wrong. Evaluation always uses right or wrong

    c.sudoku = sudoku = ConfigDict()
    sudoku.clues_min = 1  # fewest given cells of a 4x4 puzzle; few clues = many valid completions, any of which is right
    sudoku.clues_max = 4  # most given cells
    sudoku.first_share = 0.0  # share of demonstrations that are the first valid grid in ascending order; the others are any one of them

    c.countdown = countdown = ConfigDict()
    countdown.numbers_min = 3  # fewest numbers in a problem
    countdown.numbers_max = 3  # most numbers in a problem
    countdown.largest_number = 9  # numbers are drawn from 1 .. this
    countdown.largest_target = 50  # targets are in 1 .. this

    c.math = math = ConfigDict()
    math.steps_min = 2  # fewest arithmetic steps in a word problem
    math.steps_max = 2  # most arithmetic steps
    math.largest_number = 9  # numbers in the text are drawn from 2 .. this

    c.reasoning_gym = gym = ConfigDict()
    gym.dataset = "basic_arithmetic"  # name of a data set of the reasoning-gym package
    gym.options = "{}"  # JSON of its options, as reasoning_gym.create_dataset takes them; size and seed are set by task.*

    c.data = data = ConfigDict()
    data.path = ""  # folder with the published files of a task that is read and not generated (gsm8k, math500, countdown_cd3, sudoku_4x4)
    data.d1_faithful = False  # do as d1's released code where it changes a number: its rewards, its cutting of long prompts, its split

    c.model = model = ConfigDict()
    model.pretrained = ""  # folder (Hugging Face's layout) or hub name of a published model, LLaDA or Dream; "" = train one of these sizes
    model.tokenizer = ""  # folder of its tokenizer; "" = the model's own
    model.param_dtype = "auto"  # of a published model's weights: float32 | bfloat16 | auto = bfloat16 where frozen (lora.rank > 0)
    model.width = 64  # residual width D
    model.layers = 3  # transformer blocks
    model.heads = 4  # query heads; width / heads = head dimension
    model.kv_heads = 4  # key and value heads (fewer than heads = grouped-query attention)
    model.mlp_width = 192  # hidden width of the SwiGLU MLP
    model.qkv_bias = False  # biases on the query, key and value projections
    model.rope_theta = 10_000.0  # base of the rotary position frequencies
    model.norm_eps = 1e-5  # epsilon of the RMSNorms
    model.vocab_size = 8  # V, that of the task's tokenizer
    model.mask_id = 2  # id of MASK in the tokenizer
    model.dtype = "auto"  # activations: float32 | bfloat16 | auto = bfloat16 on accelerators, float32 on CPU
    model.attention = "einsum"  # einsum (anywhere) | cudnn (flash attention on NVIDIA GPUs, in bfloat16)
    model.remat = "none"  # of each block the backward pass keeps: none = recomputes nothing | dots = projections | full = its input alone
    model.head_chunk = 0  # most response positions whose [N, chunk, V] logits are held at once in likelihoods; 0 = all
    model.tie_embeddings = False  # use the embedding table as the head
    model.shift = False  # the output at a position predicts the next one (Dream)
    model.mask_in_confidence = False  # MASK keeps its probability in confidences and entropies, as in the published models' samplers
    model.count_positions = "all"  # rotary positions count: all (padding too, LLaDA) | valid (from the first token that is not, Dream)

    c.lora = lora = ConfigDict()
    lora.rank = 0  # r of the low-rank adapters; 0 = train all of the model
    lora.alpha = 64.0  # their outputs are scaled by alpha / rank
    lora.dropout = 0.0  # share of their inputs dropped in updates
    lora.targets = ()  # projections that get one, by the names the published model gives them; () = all seven of a block

    c.sft = sft = ConfigDict()
    sft.checkpoint = ""  # folder of another run's base model (its WORKDIR/sft) to start from; "" = train one here
    sft.steps = 1500  # updates of masked supervised fine-tuning
    sft.batch_size = 128  # demonstrations per update
    sft.learning_rate = 2e-3  # peak of the cosine schedule
    sft.warmup_steps = 50  # updates of linear warm-up
    sft.weight_decay = 0.01  # AdamW
    sft.checkpoint_every = 500  # updates between checkpoints
    sft.log_every = 50  # updates between metric lines

    c.sampler = sampler = ConfigDict()
    sampler.rule = "entropy_bounded"  # which positions to unmask at a step: a key of diffpo_jax.sampling.unmasking.RULES
    sampler.block_length = 0  # tokens unmasked semi-autoregressively as one block; 0 = response_length (full diffusion order)
    sampler.steps = 0  # denoising steps of the top-k rules for the whole response; 0 = one token a step
    sampler.threshold = 0.5  # inference threshold gamma of the rules that take one, when no network chooses it (entropy_bounded: nats)
    sampler.mixture = ()  # thresholds that rollouts take in turn, row by row, in place of it
    sampler.temperature = 1.0  # of the tokens drawn in RL rollouts
    sampler.lanes = 0  # rows denoised at once; the others wait in a queue and take the place of finished ones; 0 = all at once
    sampler.cache = "none"  # keys and values kept between calls, an approximation: none | prefix (before the block) | dual (outside it)
    sampler.refresh = 0  # calls in a block from one over the whole row, which renews the cache, to the next; 0 = only a block's first
    sampler.eos_early_stop = True  # once EOS is unmasked and everything before it is, the row is finished

    c.threshold_network = net = ConfigDict()
    net.hidden = 32  # width of its one hidden layer
    net.gamma_min = 0.1  # smallest threshold it can choose (unit of sampler.threshold)
    net.gamma_max = 8.0  # largest
    net.gamma_init = 1.0  # the threshold at its mean before training
    net.std_init = 1.0  # standard deviation of u before training (gamma is log-linear in sigmoid(u))
    net.distribution = "normal"  # normal (u ~ Normal, gamma = gamma_min (gamma_max/gamma_min)^sigmoid(u)) | categorical (on a grid)
    net.grid_size = 8  # thresholds of the categorical distribution, log-spaced
    net.stop_gradient = True  # do not train the trunk through the threshold network
    net.learning_rate = 1e-3  # Adam
    net.entropy_bonus = 0.003  # weight of its entropy in J_sampler

    c.rl = rl = ConfigDict()
    rl.mode = "joint"  # joint | model (fixed threshold) | sampler (frozen model)
    rl.steps = 100  # rollout-and-update iterations
    rl.calls = 0  # denoiser calls, of rollouts, likelihoods and updates, after which RL ends if it has not; 0 = no limit
    rl.prompts = 64  # prompts per iteration (B)
    rl.group_size = 16  # rollouts per prompt (G)
    rl.inner_steps = 1  # updates per rollout (mu), each with its own cuts
    rl.microbatch = 0  # most rows a device takes at once in an update, which accumulates gradients over parts; 0 = all of its rows
    rl.learning_rate = 1e-4  # AdamW on the model
    rl.warmup_steps = 5  # updates of linear warm-up
    rl.schedule = "constant"  # of the learning rate after it: constant | cosine (to 0 at the last update)
    rl.weight_decay = 0.0  # AdamW
    rl.adam_b2 = 0.99  # AdamW second-moment decay
    rl.max_grad_norm = 1.0  # gradient clipping by global norm
    rl.advantage = "grpo"  # grpo (mean and std of the group) | mean_only (Dr.GRPO, d1) | rloo (leave one out) | wd1 (w+ - w-)
    rl.objective = "clipped"  # clipped (ratio a token) | sequence (ratio a row: ESPO) | log_likelihood (REINFORCE, wd1) | sandwiched (SPG)
    rl.sampler_weight = 1.0  # alpha, the weight of J_sampler beside J_model
    rl.nfe_penalty = 0.5  # lambda: what a rollout that takes every possible step loses
    rl.reward_shape = "multiplicative"  # multiplicative r (1 - lambda NFE / NFE_max) | additive r - lambda NFE / NFE_max
    rl.model_reward = "total"  # reward of the model's advantages: total (as the sampler's) | task (without the NFE term)
    rl.clip_low = 0.2  # eps_low of the clipped surrogate
    rl.clip_high = 0.2  # eps_high
    rl.importance_weights = "truncated"  # truncated | none
    rl.importance_cap = 2.0  # C, the cap of the importance weights
    rl.normalisation = "row"  # row (1/|o_i|) | token_mean (all tokens alike) | constant (1/L, Dr.GRPO)
    rl.kl_weight = 0.005  # beta, weight of the KL to the frozen start
    rl.kl_estimator = "k3"  # k1 | k2 | k3
    rl.elbo_weight = 0.0  # weight of the rollouts' ELBO a token, at one random mask a row (DiPOD): holds entropies where they are
    rl.elbo_rows = "all"  # rollouts that it counts: all | right (answers)
    rl.max_bad_updates = 5  # non-finite updates in a row (each skipped and counted) that stop the run
    rl.checkpoint_every = 25  # iterations between checkpoints
    rl.eval_every = 50  # iterations between evaluations at the learned operating point

    c.likelihood = likelihood = ConfigDict()
    likelihood.estimator = "cuts"  # cuts (latents of the trajectory: m-MF) | elbo | quadrature | coupled (masks drawn at random)
    likelihood.num_latents = 2  # m: latents that a row's likelihood reads, a forward pass each (cuts: 1 = mean-field, 2 = 2-MF)
    likelihood.window = 0  # w: of cuts, keep positions unmasked less than w steps after theirs, reweighted; 0 = all (m-MF)
    likelihood.temperature = "sampling"  # of the surrogate: sampling (= sampler.temperature) | one
    likelihood.prompt_masking = 0.0  # probability that a prompt token is masked in the surrogates (d1: 0.15)

    c.eval = evaluation = ConfigDict()
    evaluation.thresholds = (  # grid of inference thresholds of the accuracy-NFE curve; dense around the choice between two (ln 2 nats)
        0.05, 0.15, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8, 1.0, 1.5, 2.5, 4.0, 8.0,
    )  # fmt: skip
    evaluation.temperature = 0.0  # of the tokens in evaluation (0 = argmax)
    evaluation.batch_size = 512  # rows per call of the sampler
    evaluation.skip = 0  # test problems that the curves leave out at the front: those kept from a search for settings
    evaluation.limit = 0  # test problems evaluated, the first ones after those; 0 = all
    evaluation.repeats = 1  # samples per problem (more only make sense at a temperature above 0)
    evaluation.lengths = ()  # --mode=eval at these response lengths, a line a problem in a file; () = the curve over eval.thresholds
    evaluation.rule = "low_confidence"  # rule of that evaluation; one that takes a threshold is run at each of eval.thresholds
    evaluation.block_length = 32  # its blocks, tokens; 0 = one block
    evaluation.tokens_per_step = 2  # its tokens unmasked a step by the top-k rules (steps = length / this)
    evaluation.prefill = ""  # text that its responses start with
    evaluation.score_file = ""  # score the generations in this file again, without a model
    evaluation.num_samples = 4  # problems shown by --mode=sample

    c.serve = serve = ConfigDict()
    serve.host = "127.0.0.1"  # address that --mode=serve listens at; this one is not seen from other machines, "0.0.0.0" is
    serve.port = 8000  # its port; 0 = any free one

    c.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices on the data axis: rows are split, parameters are whole; -1 on one of the three axes = the rest
    mesh.fsdp = 1  # devices on the fsdp axis: rows are split, and parameters, gathered a layer at a time
    mesh.tensor = 1  # devices on the tensor axis: heads, MLP and vocabulary are split, rows are not
    mesh.rollout = rollout = ConfigDict()  # a mesh of the same devices for rollouts and evaluations; parameters go there once an iteration
    rollout.data = 0  # as mesh.data; all three 0 = the mesh above
    rollout.fsdp = 0  # as mesh.fsdp
    rollout.tensor = 0  # as mesh.tensor

    c.distributed = distributed = ConfigDict()
    distributed.initialize = False  # this is one of several processes; on TPU, Slurm, Open MPI, Kubernetes the rest is in the environment
    distributed.coordinator = ""  # HOST:PORT of process 0; "" = from the environment
    distributed.processes = 0  # their number; 0 = from the environment
    distributed.process_id = -1  # 0 .. processes - 1; -1 = from the environment
    distributed.timeout = 40  # seconds without a sign of life from a process after which the others end

    c.wandb = wandb = ConfigDict()  # Weights & Biases, beside metrics.jsonl; its own environment variables count (WANDB_MODE=offline)
    wandb.project = ""  # name of the project that lines and summary go to; "" = none

    c.profile_steps = ()  # (first, last) RL iteration of a jax.profiler trace into the workdir's profile/; () = none
    c.checkpoint_dir = ""  # where sft/ and checkpoints/ go, seen by all hosts, say "gs://BUCKET/RUN"; "" = the workdir
    c.checkpoints_to_keep = 2  # newest RL checkpoints kept
    return c


def preset_config(task: str, presets: Mapping[str, Any], preset: str) -> ConfigDict:
    """The defaults with `presets[preset]`, {"section.field": value}, written over them.

    Raises:
      ValueError: for an unknown preset; the known ones are listed.
    """
    if preset not in presets:
        raise ValueError(f"configs/{task}.py has no preset {preset!r}; known: {', '.join(presets)}")
    config = get_config()
    config.update_from_flattened_dict({"task.name": task} | presets[preset])
    return config


DEBUG = {  # every part of a run in under a minute; learns nothing
    "task.train_size": 256,
    "task.test_size": 32,
    "model.width": 32,
    "model.layers": 1,
    "model.mlp_width": 64,
    "sft.steps": 40,
    "sft.batch_size": 32,
    "sft.checkpoint_every": 20,
    "sft.log_every": 10,
    "sampler.lanes": 0,
    "rl.microbatch": 16,
    "rl.steps": 6,
    "rl.prompts": 8,
    "rl.group_size": 4,
    "rl.checkpoint_every": 2,
    "rl.eval_every": 3,
    "eval.thresholds": (0.1, 1.0, 8.0),
    "eval.batch_size": 32,
}

SUITE: dict[str, Any] = {  # diffpo_jax.experiments: RL ends after so many denoiser calls, whatever they are spent on
    "task.test_size": 1024,  # the first half to report, the second to choose settings
    "eval.limit": 512,
    "eval.thresholds": (0.05, 0.3, 0.5, 0.65, 0.8, 1.0, 1.5, 2.5, 4.0, 8.0),
    "rl.steps": 1000,
    "rl.checkpoint_every": 1000,
}

# Published models. The settings are those of d1's released configuration (arXiv 2504.12216: LoRA, batch, lengths, optimiser, clipping, KL)
# with DiFFPO's likelihood, weights and sampler. The base is in bfloat16 (theirs: 4 bit). Hardware: LoRA with the base replicated needs
# 16 GB of weights and about as much again for activations on each accelerator (one of 40 GB or more). Cost: about 2e17 FLOP an iteration
# (rollout of 96 rows at up to 256 calls, 12 updates); d1 reports two days on eight A100-80G a task.
_PUBLISHED = {
    "model.remat": "full",
    "model.head_chunk": 32,
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "lora.rank": 128,
    "lora.alpha": 64.0,
    "lora.dropout": 0.05,
    "task.train_size": 1_000_000,  # as many as the files hold
    "task.test_size": 1_000_000,
    "task.prompt_length": 320,  # fits all of GSM8K (MATH: 960). d1: 200, longer ones cut; here they are left out, and counted
    "task.response_length": 256,
    "sampler.block_length": 32,
    "sampler.temperature": 0.9,
    "threshold_network.gamma_min": 0.01,
    "threshold_network.gamma_init": 0.3,
    "rl.steps": 1000,
    "rl.prompts": 16,
    "rl.group_size": 6,
    "rl.inner_steps": 12,
    "rl.microbatch": 6,
    "rl.learning_rate": 3e-6,
    "rl.weight_decay": 0.1,
    "rl.max_grad_norm": 0.2,
    "rl.advantage": "mean_only",
    "rl.normalisation": "token_mean",
    "rl.clip_low": 0.5,
    "rl.clip_high": 0.5,
    "rl.kl_weight": 0.04,
    "eval.batch_size": 64,
    "eval.limit": 128,  # test problems of the curves in training; --mode=eval --config.eval.limit=0 takes all
    "eval.thresholds": (0.01, 0.05, 0.1, 0.3, 1.0),
    "eval.lengths": (128, 256, 512),
    "eval.prefill": "<reasoning>",
}
_D1_SAMPLER = {  # the published sampler, at 2 tokens a step
    "rl.mode": "model",
    "rl.nfe_penalty": 0.0,
    "sampler.rule": "low_confidence",
    "sampler.steps": 128,
}


_PUBLISHED_DEBUG = {  # the same program in a minute on a small checkpoint in a published layout, given as model.pretrained
    "lora.rank": 2,
    "task.train_size": 64,
    "task.test_size": 8,
    "task.prompt_length": 512,
    "task.response_length": 64,
    "rl.steps": 2,
    "rl.prompts": 2,
    "rl.group_size": 4,
    "rl.inner_steps": 2,
    "rl.microbatch": 4,
    "rl.checkpoint_every": 1,
    "eval.batch_size": 8,
    "eval.thresholds": (0.1, 1.0),
    "eval.lengths": (32, 64),
}


def published(task: dict[str, object]) -> dict[str, dict]:
    """Presets of the published models on a task, {"section.field": value}.

    llada_8b and dream_7b, each also with _d1 and _wd1 appended; published_debug.
    """
    models = {"llada_8b": "GSAI-ML/LLaDA-8B-Instruct", "dream_7b": "Dream-org/Dream-v0-Instruct-7B"}
    algorithms: dict[str, dict[str, Any]] = {"": {}}
    algorithms |= {f"_{name}": _D1_SAMPLER | {"algorithm": name} | dict(ALGORITHMS[name]) for name in ("d1", "wd1")}
    return {
        name + suffix: _PUBLISHED | task | {"model.pretrained": hub} | fields
        for name, hub in models.items()
        for suffix, fields in algorithms.items()
    } | {"published_debug": _PUBLISHED | task | _PUBLISHED_DEBUG}
