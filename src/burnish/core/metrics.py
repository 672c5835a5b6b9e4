"""The glossary: every metric a run may emit, once, with unit and meaning. A name that is not here cannot be emitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from burnish.core.errors import BurnishError
from burnish.core.table import did_you_mean


@dataclass(frozen=True)
class Metric:
    """One quantity. `better` is the direction a reader should hope for; `neither` where a value is only a fact."""

    unit: str
    meaning: str
    better: Literal["higher", "lower", "neither"] = "neither"


METRICS: dict[str, Metric] = {
    # optimisation
    "loss": Metric("nats", "the objective: weighted sum over the labels of the optimiser batch, and router_loss where that is logged", "lower"),
    "router_loss": Metric("1", "the part of loss a mixture of experts adds for uneven routing, coefficient included", "lower"),
    "grad_norm": Metric("1", "Euclidean norm of the whole gradient before clipping"),
    "lr": Metric("1", "step size used at this step, after the schedule"),
    "epoch": Metric("1", "passes over the training rows so far"),
    "rows": Metric("rows", "training rows in this optimiser batch"),
    "label_tokens": Metric("tokens", "tokens the loss is taken on"),
    "stream_tokens": Metric("tokens", "tokens sent through the model, prompts counted once where shared"),
    "skipped_steps": Metric("steps", "updates left out so far: a loss or gradient was not finite", "lower"),
    # rewards, of the total or of one component
    "reward_mean": Metric("1", "mean over the samples that have a value; abstentions and errors are not among them", "higher"),
    "reward_std": Metric("1", "standard deviation over the same samples, divided by their number"),
    "reward_min": Metric("1", "smallest value"),
    "reward_max": Metric("1", "largest value"),
    "reward_abstained": Metric("1", "share of the samples a reward abstained on"),
    "reward_timeouts": Metric("samples", "samples whose reward was killed at its deadline", "lower"),
    "reward_crashes": Metric("samples", "samples whose reward raised or whose process died", "lower"),
    "reward_invalid": Metric("samples", "samples for which a reward returned no finite number", "lower"),
    "reward_infra": Metric("samples", "samples whose reward could not reach what it depends on", "lower"),
    "reward_flat_groups": Metric("1", "share of the groups in which every sample has the same total: no advantage", "lower"),
    "reward_cancelled_groups": Metric("1", "share of the groups whose components vary and whose total does not", "lower"),
    "components": Metric("1", "the metrics above of each reward on its own, by its title, where there are several"),
    # rollouts
    "completion_tokens": Metric("tokens", "sampled tokens of a completion, on average over the round"),
    "truncated_share": Metric("1", "share of the round's completions cut at max_new_tokens", "lower"),
    "surprisal": Metric("nats", "mean of -log p of the sampled tokens: an estimate of the policy's entropy"),
    "dead_groups": Metric("1", "share of the round's groups whose rewards are all equal: no advantage", "lower"),
    "dead_rounds": Metric("rounds", "rounds in a row, up to this one, in which no group was live after its refills", "lower"),
    "refilled_groups": Metric("groups", "groups of equal rewards that were replaced by those of other prompts, in this round"),
    "carried_groups": Metric("groups", "groups that this round began or took on and did not end: they go on in the next one"),
    "stale_tokens": Metric("1", "share of the round's completion tokens that earlier weights drew", "lower"),
    "overlong_penalty": Metric("1", "what completions near max_new_tokens lose of their reward, on average over the round", "higher"),
    "kl": Metric("nats", "KL of the old policy from the reference, a token: mean of k3 over this step's tokens", "lower"),
    "exact_kl": Metric("nats", "KL of the policy from the reference over the whole vocabulary, mean over this step's states", "lower"),
    "kl_coef": Metric("1", "what multiplied that KL in this step, where it adapts"),
    "entropy": Metric("nats", "exact entropy of the policy, mean over this step's tokens"),
    "entropy_coef": Metric("1", "what multiplied the entropy in this step"),
    "penalty_coef": Metric("1", "what multiplied the KL to the old policy in this step, where it adapts"),
    "policy_moved": Metric("nats", "KL of the old policy from the one the round before left, a token, on that round's own tokens"),
    "screened_prompts": Metric("1", "share of the prompts that are left after their pass rates were measured"),
    "favoured_prompts": Metric("1", "share of the round's prompts that the curriculum draws more often"),
    "kept_rows": Metric("rows", "completions of the round that are learned from", "higher"),
    "kept_hinted": Metric("rows", "those of them that were drawn with the answer told"),
    "solved_prompts": Metric("1", "share of the round's prompts with a completion to keep, hints aside", "higher"),
    "live_samples": Metric("1", "share of this step's completions that have a gradient", "higher"),
    "advantage_std": Metric("1", "standard deviation of the advantages of this step's labels"),
    "sampler_gap": Metric("nats", "mean |log p| between trainer and sampler over this step's labels", "lower"),
    "sampler_gap_max": Metric("nats", "the largest of them", "lower"),
    "supervised_share": Metric("1", "share of this step's labels that were given and are learned by likelihood"),
    "optimal_advantage": Metric("1", "mean of reward minus the optimal value estimated from the reference, over this step's samples"),
    "optimal_advantage_abs": Metric("1", "mean of its absolute value: how far the regression's targets are from zero"),
    "step_kl": Metric("nats", "KL(old || new) of the policy over an update, mean over this step's labels: at most the trust region's radius"),
    "step_fraction": Metric("1", "part of the trust region's full step that was taken; 0 where none was good"),
    "surrogate_gain": Metric("1", "by how much the update raised the surrogate, measured", "higher"),
    # a critic
    "value_loss": Metric("1", "half the squared error of the critic's values on this step's labels, clipped as the recipe says", "lower"),
    "value_mean": Metric("1", "mean of the critic's values of this step's labels, as of the start of the round"),
    "explained_variance": Metric("1", "1 - Var(return - value) / Var(return) over the same labels; 0 for a constant critic", "higher"),
    "pruned_share": Metric("1", "share of the round's completions cut because their value had fallen"),
    # this machine
    "seconds": Metric("s", "wall time of the step", "lower"),
    "prepare_seconds": Metric("s", "wall time of making a batch: rollouts, and log-probs of other policies", "lower"),
    "reward_seconds": Metric("s", "wall time of scoring a batch", "lower"),
    "train_tokens_per_s": Metric("tokens/s", "stream tokens divided by seconds", "higher"),
    "rss_bytes": Metric("bytes", "resident memory of the process", "lower"),
    # evaluation
    "accuracy": Metric("1", "share of the items answered correctly", "higher"),
    "truncated": Metric("items", "completions cut at max_new_tokens", "lower"),
    "unanswered": Metric("items", "completions in which no answer was found", "lower"),
    "prefill_tokens": Metric("tokens", "prompt tokens read by the engine", "lower"),
    "sampled_tokens": Metric("tokens", "tokens drawn by the engine", "lower"),
    "scored_tokens": Metric("tokens", "tokens scored without being drawn", "lower"),
    "useful_flops": Metric("FLOPs", "the least work the result needs", "lower"),
    "executed_flops": Metric("FLOPs", "the work that was launched", "lower"),
}


def emit(**values: Any) -> dict[str, Any]:
    """One row of metrics. `step` and `kind` say which row; a value that is not finite is given as None.

    Raises BurnishError on a name that is not in the glossary: that is our bug, not the user's.
    """
    for name in values:
        if name not in METRICS and name not in ("step", "kind"):
            raise BurnishError(
                f"{name!r} is not in the glossary of metrics.{did_you_mean(name, METRICS)}",
                remedy="add its unit and meaning to METRICS in burnish/core/metrics.py",
            )
    return values
