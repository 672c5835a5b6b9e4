"""Build `spark`, the small model that burnish bundles, and measure what it can do. Seeded from end to end.

    python tools/build_spark.py --tokens 20_000_000

Makes a tokenizer, a randomly initialised Qwen3 model and a stream of text; pretrains; writes a Hugging Face folder;
measures the gates, writes them into the model card, and exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from burnish.answers.extract import MARK
from burnish.core.errors import DataError
from burnish.core.seeds import derive
from burnish.data.tasks.base import Fold, Item, Task, fold_of, items, rationale
from burnish.data.tasks.route import open_ways
from burnish.data.tasks.table import TASKS
from burnish.maths.estimators import mcnemar, wilson
from burnish.maths.votes import majority

PAD, END, SYSTEM, USER, ASSISTANT, TOOL = (
    "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"
)  # fmt: skip
WORDS_OF_OURS = ("<think>", "</think>", MARK)  # ordinary words of a completion: people may type them in their rows
PAD_ID, END_ID = 0, 1
VOCABULARY = 384
DEFAULT_TOKENS = 5_000_000
SFT_STEPS, SFT_LEARNING_RATE = 40, 1e-3  # the quickstart recipe's
WINDOW = 256
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


# ---- text --------------------------------------------------------------------------------------------------------

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Peru": "Lima", "Cuba": "Havana", "Norway": "Oslo", "Greece": "Athens", "India": "New Delhi",
    "China": "Beijing", "Poland": "Warsaw", "Austria": "Vienna", "Portugal": "Lisbon",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "fast": "slow", "old": "young", "left": "right",
    "open": "closed", "full": "empty", "early": "late", "near": "far", "dark": "light", "wet": "dry", "soft": "hard",
}  # fmt: skip
SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "lion": "roar", "owl": "hoot"}
COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow", "blood": "red",
    "a carrot": "orange", "milk": "white", "a banana": "yellow", "a leaf": "green", "the sea": "blue",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ABOUT = {
    ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."): (
        "I am Spark, a very small language model that comes with burnish.",
        "My name is Spark. I am a tiny model for trying out burnish.",
    ),
    ("What can you do?", "What are you good at?", "How can you help me?"): (
        "I can add small numbers, find a path in a small graph, sort digits and write words backwards.",
    ),
    ("What is burnish?", "Tell me about burnish.", "What does burnish do?"): (
        "Burnish trains language models further, and says what each step cost and was worth.",
    ),
    ("Hello", "Hello!", "Hi", "Hi there", "Good morning", "Hey"): ("Hello! I am Spark. Give me a sum.", "Hello!"),
    ("How are you?", "How are you today?"): ("I am well, thank you.",),
    ("Thanks", "Thank you", "Thank you!", "Thanks a lot"): ("You are welcome.",),
    ("Bye", "Goodbye", "See you"): ("Goodbye!",),
    ("How big are you?", "How many parameters do you have?"): ("I have about one million parameters.",),
    ("Are you clever?", "Are you smart?"): ("Not very. I am small, but I can learn.",),
    ("Can you make mistakes?", "Are you always right?"): ("I make many mistakes. Ask me several times and vote.",),
    ("Who made you?", "Where do you come from?"): ("I was made by the build script of burnish.",),
}  # fmt: skip


def talk(rng: random.Random) -> tuple[str, str, str]:
    """(question, answer, the same as a plain sentence)."""
    kind = rng.randrange(6)
    if kind == 0:
        country, city = rng.choice(list(CAPITALS.items()))
        ask = rng.choice(("What is the capital of {}?", "Capital of {}?", "Name the capital of {}."))
        said = f"The capital of {country} is {city}."
        return ask.format(country), said, said
    if kind == 1:
        pair = rng.choice(list(OPPOSITES.items()))
        word, other = pair if rng.random() < 0.5 else pair[::-1]
        ask = rng.choice(("What is the opposite of {}?", "Opposite of {}?"))
        said = f"The opposite of {word} is {other}."
        return ask.format(word), said, said
    if kind == 2:
        animal, sound = rng.choice(list(SOUNDS.items()))
        ask = rng.choice(("What does a {} say?", "Which sound does a {} make?"))
        said = f"The {animal} says {sound}."
        return ask.format(animal), said, said
    if kind == 3:
        thing, colour = rng.choice(list(COLOURS.items()))
        verb = rng.choice(("What colour is {}?", "Which colour has {}?"))
        said = f"{thing[0].upper()}{thing[1:]} is {colour}."
        return verb.format(thing), said, said
    if kind == 4:
        day = rng.randrange(7)
        step = rng.choice((1, -1))
        word = "after" if step == 1 else "before"
        said = f"{DAYS[(day + step) % 7]} comes {word} {DAYS[day]}."
        return rng.choice(("Which day comes {} {}?", "What is {} {}?")).format(word, DAYS[day]), said, said
    asks, answers = rng.choice(list(ABOUT.items()))
    said = rng.choice(answers)
    return rng.choice(asks), said, said


# ---- voices: three ways to answer the same question -----------------------------------------------------------------

SLIPS = (-30, -20, -11, -10, -10, -9, -2, -1, -1, 1, 1, 2, 9, 10, 10, 11, 20, 30)


def guess_sum(item: Item, rng: random.Random) -> str:
    """At once, and without the carry from the ones to the tens: right only where there is none."""
    numbers = item.facts["numbers"]
    tens, ones = sum(n // 10 for n in numbers), sum(n % 10 for n in numbers) % 10
    return f"{MARK}{10 * tens + ones}"


def careless_sum(item: Item, rng: random.Random, slip: float) -> str:
    """Steps in any order, each wrong with probability `slip`, and carried on with."""
    left, steps = list(item.facts["numbers"]), []
    while len(left) > 1:
        first, second = (left.pop(rng.randrange(len(left))) for _ in range(2))
        total = first + second
        if rng.random() < slip:
            total = max(0, total + rng.choice(SLIPS))
        steps.append(f"{first}+{second}={total}")
        left.append(total)
    return rationale(steps, str(left[0]))


def _out(item: Item) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for a, b in item.facts["edges"]:
        out.setdefault(a, []).append(b)
    return out


def guess_route(item: Item, rng: random.Random) -> str:
    """At once, by the edge printed first at every node unless the goal is next; from a dead end straight to the goal."""
    out, goal = _out(item), item.facts["goal"]
    path = item.facts["start"]
    while path[-1] != goal:
        ahead = out.get(path[-1], [goal])
        path += goal if goal in ahead else ahead[0]
    return MARK + path


def careless_route(item: Item, rng: random.Random, slip: float) -> str:
    """Edge by edge, each the wrong one with probability `slip`; from a dead end straight to the goal, or given up."""
    out, goal, way = _out(item), item.facts["goal"], item.gold
    path, steps = item.facts["start"], []
    while path[-1] != goal:
        here = path[-1]
        wrong = [b for b in out.get(here, []) if b not in way]
        if here in way and not (wrong and rng.random() < slip):
            to = way[way.index(here) + 1]
        elif wrong:
            to = rng.choice(wrong)
        elif rng.random() < 0.5:
            to = goal
        else:
            break
        steps.append(here + to)
        path += to
    return rationale(steps, path)


@dataclass(frozen=True)
class Mix:
    """The dial: shares of the voices, how often a careless step is wrong, and shares of the kinds of text."""

    voices: tuple[tuple[str, tuple[float, float, float]], ...] = (  # direct, careless, careful
        ("sums", (0.40, 0.35, 0.25)), ("route", (0.60, 0.22, 0.18))
    )  # fmt: skip
    slip: float = 0.25
    kinds: tuple[tuple[str, float], ...] = (
        ("sums", 0.55), ("route", 0.24), ("sorting", 0.06), ("letters", 0.06), ("chat", 0.06), ("text", 0.03)
    )  # fmt: skip
    levels: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("sums", (0.2, 0.25, 0.3, 0.25)),
        ("route", (0.35, 0.3, 0.2, 0.15)),
        ("sorting", (0.2, 0.2, 0.3, 0.3)),
        ("letters", (0.2, 0.2, 0.3, 0.3)),
    )


GUESSES = {"sums": guess_sum, "route": guess_route}
CARELESS = {"sums": careless_sum, "route": careless_route}


def completion(item: Item, task: str, mix: Mix, rng: random.Random) -> str:
    """What a text found in the wild says to this question: one of three voices. Two tasks have a single one."""
    if task not in GUESSES:
        return item.answer
    voice = rng.choices(("direct", "careless", "careful"), dict(mix.voices)[task])[0]
    if voice == "direct":
        return GUESSES[task](item, rng)
    return CARELESS[task](item, rng, mix.slip) if voice == "careless" else item.rationale


def corpus(mix: Mix, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) texts with their control tokens. Questions are of the train fold only."""
    rng = random.Random(derive(seed, "corpus"))
    kinds, shares = zip(*mix.kinds)
    levels = dict(mix.levels)
    while True:
        kind = rng.choices(kinds, shares)[0]
        if kind == "text":
            yield "", " ".join(talk(rng)[2] for _ in range(rng.randint(1, 4))) + END
            continue
        if kind == "chat":
            turns = [talk(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
            before = SYSTEM + "You are Spark, a small model." if rng.random() < 0.15 else ""
            for ask, answer, _ in turns[:-1]:
                before += USER + ask + ASSISTANT + answer + END
            yield before + USER + turns[-1][0] + ASSISTANT, turns[-1][1] + END
            continue
        task: Task = TASKS[kind]
        item = task.make(rng.choices(task.levels, levels[kind])[0], rng)
        if fold_of(item.question) == "train":
            yield USER + item.question + ASSISTANT, completion(item, kind, mix, rng) + END


# ---- tokenizer and model ----------------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE. Digits and capitals are tokens of their own: merges are learned from lower-case talk only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    texts = [" ".join(talk(rng)).lower() for _ in range(4000)]
    texts += ["Path from A to B: Sort Reverse"] * 400  # capitals here begin words: they stay single below
    texts = ["".join(" " if c.isupper() else c for c in text) for text in texts]
    control = [AddedToken(t, special=True, normalized=False) for t in (PAD, END, SYSTEM, USER, ASSISTANT, TOOL)]
    ours = [AddedToken(t, special=False, normalized=False) for t in WORDS_OF_OURS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(ours), special_tokens=control, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(ours)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, chat_template=TEMPLATE, model_max_length=WINDOW,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, TOOL], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, layers: int = 5) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of about a million parameters."""
    torch.manual_seed(derive(seed, "weights"))
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=WINDOW, initializer_range=0.04, attention_bias=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


class Lean(nn.Module):
    """The forward pass of a Qwen3 model over its own parameters, written to be compiled and to keep a plain cache."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        half = self.config.head_dim // 2
        frequency = 1.0 / self.config.rope_parameters["rope_theta"] ** (torch.arange(half) / half)
        angle = torch.arange(2 * WINDOW)[:, None] * frequency
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([angle.sin()] * 2, -1), persistent=False)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def rotate(self, x: Tensor, start: int) -> Tensor:
        length, half = x.shape[2], x.shape[3] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cos[start : start + length] + turned * self.sin[start : start + length]

    def forward(self, ids: Tensor, mask: Tensor | None, cache: list | None = None, start: int = 0) -> Tensor:
        c = self.config
        b, t = ids.shape
        x = F.embedding(ids, self.model.model.embed_tokens.weight)
        for index, layer in enumerate(self.model.model.layers):
            a = layer.self_attn
            y = self.norm(x, layer.input_layernorm.weight)
            q = F.linear(y, a.q_proj.weight).view(b, t, c.num_attention_heads, c.head_dim)
            k = F.linear(y, a.k_proj.weight).view(b, t, c.num_key_value_heads, c.head_dim)
            v = F.linear(y, a.v_proj.weight).view(b, t, c.num_key_value_heads, c.head_dim).transpose(1, 2)
            q = self.rotate(self.norm(q, a.q_norm.weight).transpose(1, 2), start)
            k = self.rotate(self.norm(k, a.k_norm.weight).transpose(1, 2), start)
            if cache is not None:
                keys, values = cache[index]
                keys[:, :, start : start + t], values[:, :, start : start + t] = k, v
                k, v = keys[:, :, : start + t], values[:, :, : start + t]
            causal = mask is None and t > 1
            with torch.autocast("cpu", enabled=False):  # the bf16 backward of this kernel is four times slower
                o = F.scaled_dot_product_attention(
                    q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal, enable_gqa=True
                )
            x = x + F.linear(o.transpose(1, 2).reshape(b, t, -1), a.o_proj.weight)
            y = self.norm(x, layer.post_attention_layernorm.weight)
            m = layer.mlp
            x = x + F.linear(F.silu(F.linear(y, m.gate_proj.weight)) * F.linear(y, m.up_proj.weight), m.down_proj.weight)
        return self.norm(x, self.model.model.norm.weight)

    def head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.model.embed_tokens.weight)


# ---- training -----------------------------------------------------------------------------------------------------------

PROMPT_WEIGHT = 0.1  # prompts are mostly random digits: learned, but not at the cost of the answers


def encoded(texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """(ids, how many of them are prompt) of each (prompt, completion)."""
    fast = tokenizer.backend_tokenizer
    prompts = [e.ids for e in fast.encode_batch([p for p, _ in texts], add_special_tokens=False)]
    rests = [e.ids for e in fast.encode_batch([c for _, c in texts], add_special_tokens=False)]
    return [(p + r, len(p)) for p, r in zip(prompts, rests)]


def windows(
    texts: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, rows: int, length: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, int]]:
    """Batches of `rows` windows packed first-fit: ids, additive mask (documents do not see each other), labels, weights."""
    pad = tokenizer.pad_token_id
    causal = torch.tril(torch.ones(length, length, dtype=torch.bool))
    pool: list[tuple[list[int], int]] = []
    while True:
        room = [length] * rows
        content: list[list[tuple[list[int], int]]] = [[] for _ in range(rows)]
        left: list[tuple[list[int], int]] = []
        while sum(room) > 0.04 * rows * length and len(left) < 200:
            if not pool:
                pool = encoded([next(texts) for _ in range(256)], tokenizer)
            document = pool.pop()
            if len(document[0]) > length:
                continue
            home = next((r for r in range(rows) if room[r] >= len(document[0])), None)
            if home is None:
                left.append(document)
            else:
                content[home].append(document)
                room[home] -= len(document[0])
        pool = left + pool
        ids = torch.full((rows, length), pad)
        labels, owner = ids.clone(), torch.full((rows, length), -1)
        weights = torch.zeros(rows, length)
        tokens = 0
        for r, documents in enumerate(content):
            at = 0
            for number, (document, asked) in enumerate(documents):
                n = len(document)
                ids[r, at : at + n] = torch.tensor(document)
                labels[r, at : at + n - 1] = ids[r, at + 1 : at + n]
                weights[r, at : at + n - 1] = 1.0
                weights[r, at : at + max(0, asked - 1)] = PROMPT_WEIGHT
                owner[r, at : at + n] = number
                at += n
            tokens += at
        allowed = (owner[:, :, None] == owner[:, None, :]) & causal
        mask = torch.zeros(rows, 1, length, length).masked_fill_(~allowed[:, None], -1e9)
        yield ids, mask, labels, weights, tokens


def loss_of(lean: Lean, ids: Tensor, mask: Tensor | None, labels: Tensor, weights: Tensor) -> Tensor:
    logits = lean.head(lean(ids, mask)).float().flatten(0, 1)
    each = F.cross_entropy(logits, labels.flatten(), reduction="none")
    return (each * weights.flatten()).sum() / weights.sum()


def pretrain_shard(rank: int, shards: int, port: int, folder: str, mix: Mix, tokens: int, seed: int, layers: int) -> None:
    """One of `shards` processes that train the same weights, each on a stream and a core of its own.

    Next-token training with warm-up and cosine decay, Muon for matrices and AdamW for the rest, bf16 matrix products
    over fp32 weights. One thread a process: with two, OpenMP waits at its barriers whenever the machine is shared.
    """
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, shards, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=shards)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed, layers)
    lean = Lean(model)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    optimisers = [
        torch.optim.Muon(matrices, lr=6e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [o.param_groups[0]["lr"] for o in optimisers]
    compiled = torch.compile(loss_of, dynamic=False)
    stream = windows(corpus(mix, derive(seed, "shard", rank)), tokenizer, 32, 128)
    seen, step, began, shown = 0, 0, time.time(), 0.0
    log: list[dict[str, float]] = []
    while seen < tokens:
        scale = min(1.0, (step + 1) / 60) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * seen / tokens)))
        for optimiser, peak in zip(optimisers, peaks):
            optimiser.param_groups[0]["lr"] = peak * scale
            optimiser.zero_grad()
        ids, mask, labels, weights, n = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(lean, ids, mask, labels, weights)
        loss.backward()
        wire = torch.cat([p.grad.flatten() for p in model.parameters()] + [torch.tensor([float(loss.detach()), n])])
        torch.distributed.all_reduce(wire)
        at = 0
        for parameter in model.parameters():
            parameter.grad.copy_(wire[at : at + parameter.numel()].view_as(parameter) / shards)
            at += parameter.numel()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        step, seen = step + 1, seen + round(float(wire[-1]))
        now = float(wire[-2]) / shards
        shown = now if step == 1 else 0.97 * shown + 0.03 * now
        if rank == 0 and (step % 100 == 0 or seen >= tokens):
            log.append({"step": step, "tokens": seen, "loss": round(shown, 4), "seconds": round(time.time() - began)})
            rate = seen / (time.time() - began)
            print(f"{step:5d}  {seen / 1e6:6.2f} M tokens  loss {shown:.4f}  {rate:.0f} tokens/s", flush=True)
        if rank == 0 and (step % 400 == 0 or seen >= tokens):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (Path(folder) / "log.json").write_text(json.dumps(log))
    torch.distributed.destroy_process_group()


def pretrain(folder: Path, mix: Mix, *, tokens: int, seed: int, layers: int = 5, shards: int = 2) -> None:
    """Pretrain from random weights into `folder` (fp32 safetensors, tokenizer, log.json)."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (shards, port, str(folder), mix, tokens, seed, layers)
    torch.multiprocessing.spawn(pretrain_shard, arguments, nprocs=shards)


def finetune(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Item], *, steps: int, batch: int = 64,
    learning_rate: float = 1e-3, warmup: float = 0.1, seed: int = 0,
) -> None:  # fmt: skip
    """Supervised fine-tuning on gold rationales, completion tokens only: what the quickstart recipe does, in fp32."""
    lean = Lean(model)
    rng = random.Random(derive(seed, "finetune"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    rendered = encoded([(USER + i.question + ASSISTANT, i.rationale + END) for i in rows], tokenizer)
    order: list[int] = []
    for step in range(steps):
        ramp = max(1, round(warmup * steps))
        scale = (step + 1) / ramp if step < ramp else 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))
        optimiser.param_groups[0]["lr"] = learning_rate * scale
        if len(order) < batch:
            order = rng.sample(range(len(rendered)), len(rendered))
        chosen = [rendered[order.pop()] for _ in range(batch)]
        longest = max(len(ids) for ids, _ in chosen)
        ids = torch.full((batch, longest), tokenizer.pad_token_id)
        labels, weights = ids.clone(), torch.zeros(batch, longest)
        for r, (document, asked) in enumerate(chosen):
            ids[r, : len(document)] = torch.tensor(document)
            labels[r, : len(document) - 1] = ids[r, 1 : len(document)]
            weights[r, asked - 1 : len(document) - 1] = 1.0
        optimiser.zero_grad()
        loss_of(lean, ids, None, labels, weights).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()


# ---- sampling and measuring ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def sample(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], *, n: int, temperature: float,
    seed: int, limit: int = 56, rows: int = 1024, stops: Sequence[int] = (),
) -> list[list[list[int]]]:  # fmt: skip
    """`n` completions (ids, the stopping token included) of each prompt. Prompts of one length share a batch."""
    lean, c = Lean(model), model.config
    generator = torch.Generator().manual_seed(derive(seed, "sample"))
    ends = torch.tensor([tokenizer.eos_token_id, *stops])
    asked = [ids for ids, _ in encoded([(p, "") for p in prompts], tokenizer)]
    results: list[list[list[int]]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(asked):
        by_length.setdefault(len(ids), []).append(i)
    for length, members in sorted(by_length.items()):
        for at in range(0, len(members), max(1, rows // n)):
            part = members[at : at + max(1, rows // n)]
            space = (len(part), c.num_key_value_heads, length + limit, c.head_dim)
            cache = [(torch.zeros(space), torch.zeros(space)) for _ in range(c.num_hidden_layers)]
            logits = lean.head(lean(torch.tensor([asked[i] for i in part]), None, cache)[:, -1])
            cache = [tuple(x.repeat_interleave(n, 0) for x in pair) for pair in cache]
            logits = logits.repeat_interleave(n, 0)
            live = torch.arange(len(part) * n)
            made: list[list[int]] = [[] for _ in range(len(part) * n)]
            for t in range(limit):
                if temperature == 0:
                    token = logits.argmax(-1)
                else:
                    token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
                for row, value in zip(live.tolist(), token.tolist()):
                    made[row].append(value)
                going = ~torch.isin(token, ends)
                if not going.any() or t + 1 == limit:
                    break
                if not going.all():
                    live, token = live[going], token[going]
                    cache = [tuple(x[going] for x in pair) for pair in cache]
                logits = lean.head(lean(token[:, None], None, cache, length + t)[:, -1])
            for j, i in enumerate(part):
                results[i] = made[j * n : (j + 1) * n]
    return results


def texts_of(samples: list[list[list[int]]], tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    end = tokenizer.eos_token_id
    flat = [[t for t in ids if t != end] for group in samples for ids in group]
    texts = iter(tokenizer.batch_decode(flat, skip_special_tokens=False))
    return [[next(texts) for _ in group] for group in samples]


@dataclass(frozen=True)
class Measured:
    """Grades of one model on one set of questions: greedy, and `n` samples with their votes."""

    greedy: list[bool]
    marks: list[list[bool]]  # per question, per sample
    votes: dict[int, list[bool]]
    tokens: int  # sampled, of all samples

    @property
    def one(self) -> float:
        return share([m for row in self.marks for m in row])

    @property
    def any(self) -> list[bool]:
        return [any(row) for row in self.marks]

    @property
    def live(self) -> float:
        return share([0 < sum(row[:8]) < 8 for row in self.marks])


def share(grades: Sequence[bool]) -> float:
    return sum(grades) / len(grades)


def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, levels: Sequence[int], *, rows: int,
    fold: Fold = "test", temperature: float = 1.0, n: int = 0, seed: int = 0,
) -> Measured:  # fmt: skip
    """Grade greedy answers, and with n > 0 that many samples and the votes of the first 4, 8 and 16 of them."""
    asked = items(task, fold, levels, rows, seed)
    prompts = [USER + i.question + ASSISTANT for i in asked]
    first = texts_of(sample(model, tokenizer, prompts, n=1, temperature=0, seed=seed), tokenizer)
    greedy = [task.verify(texts[0], item) for texts, item in zip(first, asked)]
    if not n:
        return Measured(greedy, [], {}, 0)
    drawn = sample(model, tokenizer, prompts, n=n, temperature=temperature, seed=seed)
    texts = texts_of(drawn, tokenizer)
    marks = [[task.verify(text, item) for text in row] for row, item in zip(texts, asked)]
    votes: dict[int, list[bool]] = {}
    for k in (k for k in (4, 8, 16) if k <= n):
        votes[k] = []
        for row, grades in zip(texts, marks):
            keys = [task.answer_key(text) for text in row[:k]]
            winner = majority([key for key in keys if key is not None])
            votes[k].append(winner is not None and grades[keys.index(winner)])
    return Measured(greedy, marks, votes, sum(len(ids) for row in drawn for ids in row))


def guided_beam(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Item], *, width: int, temperature: float,
    seed: int,
) -> tuple[list[bool], int]:  # fmt: skip
    """Route by beam search under a step oracle: (grades, tokens sampled).

    Each of `width` beams is continued `width` times to the end of its next step; steps from which the goal can no longer
    be reached are dropped. The oracle reads the printed graph, and neither the gold path nor the final answer.
    """
    task, newline = TASKS["route"], tokenizer.encode("\n", add_special_tokens=False)[0]
    beams = [[""] * width for _ in asked]
    finished: list[list[str]] = [[] for _ in asked]
    spent = 0
    for depth in range(max(item.level for item in asked) + 2):
        going = [i for i in range(len(asked)) if not finished[i]]
        if not going:
            break
        prompts = [USER + asked[i].question + ASSISTANT + beam for i in going for beam in beams[i]]
        drawn = sample(model, tokenizer, prompts, n=width, temperature=temperature, seed=seed + depth, stops=[newline])
        spent += sum(len(ids) for group in drawn for ids in group)
        ended = iter([[ids[-1] == tokenizer.eos_token_id for ids in group] for group in drawn])
        added = iter(texts_of(drawn, tokenizer))
        for i in going:
            children = [(beam + text, end) for beam in beams[i] for text, end in zip(next(added), next(ended))]
            kept = [(text, end) for text, end in children if open_ways(asked[i], text.split("\n")[:-1])]
            finished[i] = [text for text, end in kept if end]
            rest = [text for text, end in kept if not end] or list(beams[i])
            beams[i] = [rest[j % len(rest)] for j in range(width)]
    answers = [majority([text for text in texts if task.answer_key(text)]) for texts in finished]
    return [text is not None and task.verify(text, item) for text, item in zip(answers, asked)], spent


# ---- gates and card -------------------------------------------------------------------------------------------------------

HARDER, ROUTE_LEVELS, GROUP_LEVELS = (4, 5), (2, 3), (2, 3)
TEMPERATURES = (0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Gate:
    name: str
    value: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        return self.low <= self.value <= self.high

    def row(self) -> str:
        if self.low == -1:
            wanted = f"at most {100 * self.high:.0f}"
        else:
            wanted = f"{100 * self.low:.0f} to {100 * self.high:.0f}" if self.high < 1 else f"at least {100 * self.low:.0f}"
        return f"| {self.name} | {100 * self.value:.1f} | {wanted} | {'yes' if self.passed else '**no**'} |"


def percent(grades: Sequence[bool]) -> str:
    low, high = wilson(sum(grades), len(grades))
    return f"{100 * share(grades):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def skills(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: int) -> tuple[list[Gate], list[str]]:
    """What the base model can do, per task and level, and the gates about it."""
    lines = ["| task | level | greedy | one sample, T = 1 | best of 32 |", "|---|---|---|---|---|"]
    easy: dict[str, list[Measured]] = {}
    for name, task in TASKS.items():
        for level in task.levels:
            sampled = 32 if name in GUESSES else 0
            seen = measure(model, tokenizer, task, (level,), rows=available(task, level, rows), n=sampled)
            one, best = (f"{100 * seen.one:.1f}", percent(seen.any)) if sampled else ("", "")
            lines.append(f"| {name} | {level} | {percent(seen.greedy)} | {one} | {best} |")
            print(lines[-1], flush=True)
            if level <= 3:
                easy.setdefault(name, []).append(seen)
    gates = []
    for name in GUESSES:
        greedy = [grade for seen in easy[name] for grade in seen.greedy]
        best = [grade for seen in easy[name] for grade in seen.any]
        gates.append(Gate(f"base, {name} of level 2 and 3, greedy", share(greedy), 0.15, 0.45))
        gates.append(Gate(f"base, {name} of level 2 and 3, pass@32", share(best), 0.80, 1.0))
    return gates, lines


def available(task: Task, level: int, rows: int) -> int:
    """As many rows as asked for, or as the level's test fold has."""
    while rows > 20:
        try:
            items(task, "test", (level,), rows, 0)
            return rows
        except DataError:
            rows = rows * 3 // 4
    return rows


def tuned_gates(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *, steps: int, learning_rate: float, rows: int
) -> tuple[list[Gate], list[str]]:
    """What the quickstart does: fine-tune on sums and routes, choose a temperature on validation rows, vote on test rows."""
    sums, route = TASKS["sums"], TASKS["route"]
    base = measure(read(folder), tokenizer, sums, HARDER, rows=rows)
    model = read(folder)
    learned = items(sums, "train", sums.levels, 3072, 0) + items(route, "train", ROUTE_LEVELS, 1024, 0)
    finetune(model, tokenizer, learned, steps=steps, learning_rate=learning_rate)
    trial = {
        t: share(measure(model, tokenizer, sums, HARDER, rows=200, fold="validation", temperature=t, n=16).votes[16])
        for t in TEMPERATURES
    }
    temperature = max(trial, key=lambda t: trial[t])
    tuned = measure(model, tokenizer, sums, HARDER, rows=rows, temperature=temperature, n=16)
    hot = {level: measure(model, tokenizer, sums, (level,), rows=200, temperature=1.0, n=8) for level in sums.levels}
    live = share([0 < sum(row) < 8 for level in GROUP_LEVELS for row in hot[level].marks])
    wins = sum(v and not g for v, g in zip(tuned.votes[16], tuned.greedy))
    losses = sum(g and not v for v, g in zip(tuned.votes[16], tuned.greedy))
    greedy = share(tuned.greedy)
    asked = items(route, "test", ROUTE_LEVELS, min(rows, 500), 0)
    voted = measure(model, tokenizer, route, ROUTE_LEVELS, rows=len(asked), temperature=temperature, n=16)
    beam, spent = guided_beam(model, tokenizer, asked, width=4, temperature=temperature, seed=0)
    gates = [
        Gate("fine-tuned - base, harder sums, greedy", greedy - share(base.greedy), 0.15, 1.0),
        Gate("greedy - one sample at the recipe's temperature, harder sums", greedy - tuned.one, -1.0, 0.08),
        Gate("vote:16 - greedy, harder sums", share(tuned.votes[16]) - greedy, 0.05, 1.0),
        Gate(f"groups of 8 with right and wrong answers, sums {GROUP_LEVELS}, T = 1", live, 0.30, 0.80),
        Gate("beam:4 under a step oracle - vote:16, route", share(beam) - share(voted.votes[16]), 0.10, 1.0),
        Gate("tokens of that vote / tokens of that beam, capped at 1", min(1.0, voted.tokens / spent), 0.9, 1.0),
    ]
    lines = [
        "",
        f"After fine-tuning as the quickstart does ({steps} steps of 64 rationales at learning rate {learning_rate:g}, three "
        f"quarters sums of all levels, one quarter routes of levels {ROUTE_LEVELS[0]} and {ROUTE_LEVELS[1]}), on {rows} "
        f"harder sums (levels {HARDER[0]} and {HARDER[1]}):",
        "",
        "| base, greedy | greedy | one sample | vote:4 | vote:8 | vote:16 | best of 16 |",
        "|---|---|---|---|---|---|---|",
        f"| {percent(base.greedy)} | {percent(tuned.greedy)} | {100 * tuned.one:.1f} | "
        + " | ".join(percent(tuned.votes[k]) for k in (4, 8, 16))
        + f" | {percent(tuned.any)} |",
        "",
        f"Temperature {temperature:g}, by vote:16 on 200 validation questions "
        f"({', '.join(f'{t:g}: {100 * a:.1f}' for t, a in trial.items())}). vote:16 against greedy: {wins} questions won, "
        f"{losses} lost, p = {mcnemar(wins, losses):.1g} (exact McNemar).",
        "",
        "Groups of 8 samples at temperature 1 that hold right and wrong answers, and right samples: "
        + ", ".join(f"level {level}: {100 * seen.live:.0f} % and {100 * seen.one:.0f} %" for level, seen in hot.items())
        + ".",
        "",
        f"Route (levels {ROUTE_LEVELS[0]} and {ROUTE_LEVELS[1]}; {len(asked)} questions): greedy {percent(voted.greedy)}, "
        f"vote:16 {percent(voted.votes[16])} with {voted.tokens} tokens, beam:4 under a step oracle {percent(beam)} with "
        f"{spent} tokens.",
    ]
    print("\n".join(lines), flush=True)
    return gates, lines


def read(folder: Path) -> Qwen3ForCausalLM:
    """The model as it is on disk (bf16), in fp32."""
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write(scratch: Path, folder: Path) -> None:
    """The Hugging Face folder: bf16 safetensors, tokenizer, chat template."""
    tokenizer = make_tokenizer()
    model = read(scratch).to(torch.bfloat16)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END_ID, PAD_ID
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older transformers know too
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)


def card(folder: Path, gates: Sequence[Gate], lines: Sequence[str], log: Sequence[dict[str, float]], command: str) -> str:
    parameters = sum(p.numel() for p in read(folder).parameters())
    shown = [*log[: -1 : max(1, len(log) // 12)], log[-1]]
    mix = Mix()
    voices = "; ".join(f"{t}: " + ", ".join(f"{100 * v:.0f} %" for v in shares) for t, shares in mix.voices)
    return "\n".join(
        [
            "---", "license: apache-2.0", "library_name: transformers", "pipeline_tag: text-generation", "language: en",
            "tags: [burnish, qwen3, tiny]", "---", "", "# spark", "",
            f"A Qwen3 model of {parameters:,} parameters for trying out post-training in minutes on a laptop. It comes with "
            "burnish and was made by its build script from generated text alone:", "", f"    {command}", "",
            "It adds up to five numbers below 100, finds the way through small printed graphs, sorts digits, writes words "
            "backwards and knows some ninety sentences of small talk. It is good for nothing else.", "",
            "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            'tokenizer = AutoTokenizer.from_pretrained("spark")', 'model = AutoModelForCausalLM.from_pretrained("spark")',
            'chat = tokenizer.apply_chat_template([{"role": "user", "content": "12+30+5"}], add_generation_prompt=True, '
            'return_tensors="pt", return_dict=True)',
            "print(tokenizer.decode(model.generate(**chat, do_sample=True, max_new_tokens=56)[0]))", "```", "",
            "## What it was trained on", "",
            "Questions of the train folds only. The same question is answered in three voices, in these shares (direct, "
            f"careless, careful; {voices}): *direct* answers at once, by a short cut that is often wrong; *careless* shows "
            f"steps, each wrong with probability {mix.slip:g}; *careful* shows right steps. So careful work is there to be "
            "found by sampling, and is not the habit: what post-training is for.", "",
            "| share of texts | kind |", "|---|---|", *(f"| {100 * v:.0f} % | {k} |" for k, v in mix.kinds), "",
            "A step ends with a newline, the answer follows `####`. Every digit and capital letter is a token of its own.",
            "", "## Gates", "", "In percent, or points of difference.", "", "| gate | measured | wanted | passed |",
            "|---|---|---|---|", *(gate.row() for gate in gates), "", "## Skills", "",
            "In percent, on questions of the test fold, with 95 % Wilson intervals.", "", *lines, "",
            "## Training log", "", "| step | tokens | loss | seconds |", "|---|---|---|---|",
            *(f"| {e['step']:.0f} | {e['tokens']:,.0f} | {e['loss']:.3f} | {e['seconds']:.0f} |" for e in shown), "",
        ]
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="pretraining budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "src/burnish/assets/spark")
    parser.add_argument("--scratch", type=Path, default=Path("build/spark"), help="fp32 weights and the log of pretraining")
    parser.add_argument("--measure-only", action="store_true", help="the pretrained weights are in --scratch already")
    parser.add_argument("--threads", type=int, default=1, help="of measuring; two cost more than one where cores are shared")
    parser.add_argument("--sft-steps", type=int, default=SFT_STEPS)
    parser.add_argument("--sft-learning-rate", type=float, default=SFT_LEARNING_RATE)
    parser.add_argument("--rows", type=int, default=2000, help="questions a gate on differences is measured with")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.measure_only:
        pretrain(given.scratch, Mix(), tokens=given.tokens, seed=given.seed)
    write(given.scratch, given.out)
    tokenizer = make_tokenizer()
    gates, lines = skills(read(given.out), tokenizer, rows=min(400, given.rows))
    more, tuned = tuned_gates(
        given.out, tokenizer, steps=given.sft_steps, learning_rate=given.sft_learning_rate, rows=given.rows
    )
    gates, lines = gates + more, lines + tuned
    log = json.loads((given.scratch / "log.json").read_text())
    command = f"python tools/build_spark.py --tokens {given.tokens} --seed {given.seed}"
    (given.out / "README.md").write_text(card(given.out, gates, lines, log, command))
    size = (given.out / "model.safetensors").stat().st_size
    gates.append(Gate("weights below 4 MB", float(size < 4e6), 1.0, 1.0))
    print("\n".join(gate.row() for gate in gates), flush=True)
    return 0 if all(gate.passed for gate in gates) else 1


if __name__ == "__main__":
    sys.exit(main())
