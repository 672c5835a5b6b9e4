"""Make the fixture of this folder: TRL's GRPO and RLOO losses, gradients and advantages on the same tensors, number by number.

    .venv-peers/bin/python tests/equivalence/trl_grpo/generate.py             write the fixture again
    .venv-peers/bin/python tests/equivalence/trl_grpo/generate.py --check     compare a fresh run with what is committed

TRL's own `_compute_loss` runs on log-probs given to it: a trainer is made without a model, and its forward pass returns a
leaf tensor. Its factor for the sampler's mismatch multiplies the policy term of each token, so the derivative by that factor
*is* the weighted policy loss of the token. Advantages are made inside a method that also generates, so the statements that
make them are cut out of TRL's source and run as they stand. `make peers` makes the environment.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", CUDA_VISIBLE_DEVICES="")

import torch
import trl
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer
from trl.trainer import grpo_trainer, rloo_trainer
from trl.trainer.rloo_trainer import RLOOTrainer

HERE = Path(__file__).resolve().parent
LENGTHS, GROUP_SIZE, LONGEST = (3, 7, 5, 1, 6, 4, 2, 7), 4, 7
REWARDS = [[1.0, 0.0, 1.0, 0.25, 0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.3, 0.1, 0.2, 0.9, 0.4, 0.4]]

# name -> settings of the trainer that differ from TRL's defaults
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "grpo_kl": {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    "grpo_kl_unbiased": {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
    "grpo_delta": {"loss_type": "grpo", "delta": 1.6},
    "grpo_forks": {"loss_type": "grpo", "top_entropy_quantile": 0.4},
    "grpo_off_policy": {"loss_type": "grpo", "off_policy_mask_threshold": 0.05, "beta": 0.04},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    "gmpo": {"loss_type": "grpo", "epsilon": 0.4, "epsilon_high": 0.4},
    "token_truncate": {"mode": "token_truncate", "max": 1.2},
    "token_mask": {"mode": "token_mask", "min": 0.8, "max": 1.2},
    "sequence_truncate": {"mode": "sequence_truncate", "max": 1.2},
    "sequence_mask": {"mode": "sequence_mask", "min": 0.7, "max": 1.2},
    "rloo": {"loss_type": "rloo"},
}
CORRECTIONS = [name for name, case in CASES.items() if "mode" in case]
LOSSES = [name for name in CASES if name not in CORRECTIONS]


def tensors() -> dict[str, Tensor]:
    """[8, 7] padded with what must never be read, and [8]."""
    g = torch.Generator().manual_seed(33)  # where every limit below stops some token and not all
    mask = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).long()
    old = -3 * torch.rand(mask.shape, generator=g, dtype=torch.float64)
    made = {"old": old}
    for name, scale in (("policy", 0.3), ("sampler", 0.2), ("ref", 0.5)):
        made[name] = old + scale * torch.randn(mask.shape, generator=g, dtype=torch.float64)
    made["entropy"] = torch.rand(mask.shape, generator=g, dtype=torch.float64)
    made = {name: torch.where(mask.bool(), x, -7.0) for name, x in made.items()}
    return made | {"mask": mask, "advantage": torch.randn(len(LENGTHS), generator=g, dtype=torch.float64)}


class Alone:
    """Accelerator of one process."""

    num_processes, process_index, sync_gradients, device = 1, 0, True, torch.device("cpu")

    def gather(self, x: Any) -> Any:
        return x

    gather_for_metrics = gather

    def pad_across_processes(self, x: Any, dim: int, pad_index: float) -> Any:
        return x

    def reduce(self, x: Any, reduction: str) -> Any:
        return x


def trainer_of(settings: dict[str, Any], kind: type) -> Any:
    """A trainer without a model: only what `_compute_loss` reads, by the names TRL gives it."""
    given = GRPOConfig(output_dir="unused", bf16=False, report_to=[], **settings)
    made = kind.__new__(kind)
    for name in ("loss_type", "importance_sampling_level", "beta", "top_entropy_quantile", "off_policy_mask_threshold"):
        setattr(made, name, getattr(given, name))
    made.args, made.accelerator, made.model = given, Alone(), SimpleNamespace(training=True)
    made.epsilon_low = given.epsilon
    made.epsilon_high = given.epsilon if given.epsilon_high is None else given.epsilon_high
    made.max_completion_length, made.current_gradient_accumulation_steps = LONGEST, 1
    made.args.steps_per_generation = 1
    made.use_vllm = made.vllm_importance_sampling_correction = kind is GRPOTrainer and settings["loss_type"] != "vespo"
    made._entropy_bonus_enabled = made.aux_loss_enabled = False
    made._metrics = {"train": defaultdict(list)}
    return made


def run(name: str, given: dict[str, Tensor]) -> dict[str, Any]:
    """Loss, its gradient by the log-probs, and where TRL lets it be seen the weighted policy loss of each token."""
    settings = CASES[name]
    start = "old" if name == "rloo" else "policy"  # elsewhere TRL clips the product of a whole completion's ratios
    policy = given[start].clone().requires_grad_()
    factor = torch.ones_like(policy).requires_grad_()
    if name == "rloo":
        made = RLOOTrainer.__new__(RLOOTrainer)
        made.epsilon_low = made.epsilon_high = 0.2
        made.accelerator, made.model, made.aux_loss_enabled = Alone(), SimpleNamespace(training=True), False
        made._metrics = {"train": defaultdict(list)}
    else:
        made = trainer_of(settings, GMPOTrainer if name == "gmpo" else GRPOTrainer)
    made._get_per_token_logps_and_entropies = lambda *a, **k: (policy, given["entropy"], None)
    ids = torch.zeros_like(given["mask"])
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": given["mask"],
        "advantages": given["advantage"],
        "old_per_token_logps": given["old"],
        "old_logps": (given["old"] * given["mask"]).sum(1),
        "ref_per_token_logps": given["ref"],
        "num_items_in_batch": given["mask"].sum(),
    }
    if name != "vespo":
        inputs["importance_sampling_ratio"] = factor
    if name == "grpo_off_policy":
        inputs["sampling_per_token_logps"] = given["sampler"]
    loss = made._compute_loss(made.model, inputs)
    by_policy, by_factor = torch.autograd.grad(loss, (policy, factor), allow_unused=True)
    flat = given["mask"].bool()
    assert bool((by_policy[~flat] == 0).all())
    seen = None if by_factor is None else by_factor[flat].tolist()
    return {"settings": settings, "loss": loss.item(), "gradient": by_policy[flat].tolist(), "token_loss": seen}


def cut(module: Any, begin: str, end: str) -> str:
    """The statements of TRL's generate-and-score method from one line of its source up to another."""
    kind = module.GRPOTrainer if module is grpo_trainer else module.RLOOTrainer
    source = inspect.getsource(kind._generate_and_score_completions)
    assert source.count(begin) == 1 and source.count(end) == 1, "TRL has changed: look where these statements went"
    lines = source[source.rindex("\n", 0, source.index(begin)) + 1 : source.index(end)]
    return textwrap.dedent(lines.rsplit("\n", 1)[0])


def advantages() -> dict[str, list[float]]:
    """TRL's advantages, `None` rewards included, by its three scalings, its decoupled normalisation, and RLOO."""
    found = {}
    rewards = torch.tensor(REWARDS, dtype=torch.float64).T
    with_none = rewards.clone()
    with_none[2] = torch.nan  # a completion that no reward function could judge
    statements = cut(grpo_trainer, "unscorable_mask = ", "# Slice to keep only the local part of the data")
    for scale in ("group", "none", "normalize_then_sum"):
        for suffix, per_func in (("", rewards), ("_none", with_none)):
            me = SimpleNamespace(
                multi_objective_aggregation=scale if scale == "normalize_then_sum" else "sum_then_normalize",
                scale_rewards=scale,
                reward_weights=torch.tensor([1.0, 0.5], dtype=torch.float64),
                reward_funcs=[None, None],
            )
            scope = {
                **vars(grpo_trainer),
                "self": me,
                "rewards_per_func": per_func,
                "device": "cpu",
                "num_generations": GROUP_SIZE,
            }
            exec(statements, scope)
            found[scale + suffix] = scope["advantages"].tolist()
    statements = cut(rloo_trainer, "grouped_rewards = rewards.view", "# Slice to keep only the local part of the data")
    for suffix, per_func in (("", rewards), ("_none", with_none)):
        me = SimpleNamespace(normalize_advantages=False)
        scope = {**vars(rloo_trainer), "self": me, "rewards": per_func[:, 0].clone(), "num_generations": GROUP_SIZE}
        exec(statements, scope)
        found["rloo" + suffix] = scope["advantages"].tolist()
    return found


def correction(name: str, given: dict[str, Tensor]) -> list[float]:
    """TRL's factor for trainer over sampler."""
    case = CASES[name]
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    begin = source.index(
        "mask = completion_mask if tool_mask is None else completion_mask * tool_mask\n                per_token_logps_diff"
    )
    begin = source.rindex("\n", 0, begin) + 1
    end = source.index("# Compute the per-token log probabilities for the reference model")
    me = SimpleNamespace(
        vllm_importance_sampling_mode=case["mode"],
        vllm_importance_sampling_clip_min=case.get("min"),
        vllm_importance_sampling_clip_max=case["max"],
    )
    scope = {
        **vars(grpo_trainer),
        "self": me,
        "completion_mask": given["mask"],
        "tool_mask": None,
        "old_per_token_logps": given["old"],
        "sampling_per_token_logps": given["sampler"],
    }
    exec(textwrap.dedent(source[begin:end].rsplit("\n", 1)[0]), scope)
    ratio = scope["vllm_importance_sampling_ratio"].expand(given["mask"].shape)
    return ratio[given["mask"].bool()].tolist()


def fixture() -> dict[str, Any]:
    given = tensors()
    flat = given["mask"].bool()
    inputs = {name: given[name][flat].tolist() for name in ("policy", "old", "sampler", "ref", "entropy")}
    return {
        "schema": 1,
        "versions": {"trl": trl.__version__, "torch": torch.__version__},
        "lengths": LENGTHS,
        "group_size": GROUP_SIZE,
        "longest": LONGEST,
        "rewards": REWARDS,
        "inputs": inputs | {"advantage": given["advantage"].tolist()},
        "losses": {name: run(name, given) for name in LOSSES},
        "corrections": {name: {"settings": CASES[name], "weight": correction(name, given)} for name in CORRECTIONS},
        "advantages": advantages(),
    }


def close(a: Any, b: Any) -> bool:
    """Equal but for rounding, the versions apart."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(key == "versions" or close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return abs(a - b) <= 1e-9 * max(1.0, abs(a)) if isinstance(a, float) else a == b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a fresh run differs")
    fresh = json.loads(json.dumps(fixture()))
    path = HERE / "fixture.json"
    if parser.parse_args().check:
        same = close(fresh, json.loads(path.read_text(encoding="utf-8")))
        print("the fixture is what TRL does" if same else "TRL does something else now")
        sys.exit(not same)
    path.write_text(json.dumps(fresh, indent=1) + "\n", encoding="utf-8")
    for name, case in fresh["losses"].items():
        print(f"{name:18} loss {case['loss']:.6f}")


if __name__ == "__main__":
    main()
