"""The policy-gradient algebra: a method is a point in a grid of small tables, and a named method is one declaration.

    advantage   what a completion or token was worth        weights        how labels are averaged over the batch
    ratio       how far the policy has moved                kl, placement  the price of leaving the reference
    surrogate   what becomes of the gradient as it moves    filters        what is left out
    correction  the sampler is not quite the old policy     whiten         the scale of advantages over the batch
    entropy     a bonus for staying undecided               controls       coefficients that adapt (`maths.controls`)

Every row of every table takes what it needs by name. `needs` says which columns a setting wants, so that a critic, a
reference or a greedy answer is made where something takes it and never asked for by a method's name. Columns, over the
whole optimiser batch (axes: m entries, u units):

    unit [m], reward [u], known [u]                  always; unit is the sequence of each label, known False = no reward
    group [u], finished [u]                          the prompt of each unit; whether it ended by itself
    old_logprobs, sampler_logprobs, ref_logprobs [m] at the start of the optimiser batch; as sampled; of the reference
    value [m], entropy [m], noise [m]                of the critic; of the policy (old); uniform, seeded
    greedy_reward [u], reward_trace [2]              of the prompt's greedy answer; state of the moving average
    rewards [u c], rewards_known, component_weight   of several rewards kept apart
    step_reward [p], step_known, step_end            of steps; token_reward [m] where an environment pays by the token

`prepare` makes from them, once for the batch, what `objective_of` captures. Named settings: `maths.settings`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.core.table import load_row, load_table
from burnish.maths.advantages import whiten
from burnish.maths.divergences import high_covariance, token_rewards, with_kl
from burnish.maths.head import Objective

if TYPE_CHECKING:
    from jaxtyping import Float

AXES = ("advantage", "ratio", "surrogate", "correction", "kl", "weights")  # each the name of a table's row
FILTERS = ("sequence_filters", "token_filters")  # each the names of several
MADE = {"logprobs", "log_ratio", "advantage", "length", "high_covariance"}  # columns nobody brings


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A point of the grid. Below the axes stand the parameters of their rows; None leaves a row its own default.

    `kl_coef` 0 switches the KL to the reference off, `entropy_coef` 0 the bonus. A target or a steepness makes its
    coefficient adapt, see `controls`; None leaves it fixed. Raises ConfigError, naming what to change, for a combination that
    cannot be meant or a parameter that no chosen row takes.
    """

    advantage: str = "group_standardised"
    ratio: str = "token"
    surrogate: str = "clip"
    correction: str = "none"
    weights: str = "token_mean"
    kl: str = "k3"
    kl_coef: float = 0.0
    kl_placement: Literal["loss", "reward"] = "loss"
    whiten: Literal["none", "units", "tokens"] = "none"
    sequence_filters: tuple[str, ...] = ()
    token_filters: tuple[str, ...] = ()
    # of the advantage
    epsilon: float | None = None
    gamma: float | None = None
    lam: float | None = None
    pass_k: int | None = None
    # of the surrogate
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    ratio_max: float | None = None
    tau_positive: float | None = None
    tau_negative: float | None = None
    log_clip: float | None = None
    shape_positive: float | None = None
    rate_positive: float | None = None
    shape_negative: float | None = None
    rate_negative: float | None = None
    penalty_coef: float | None = None
    cov_penalty: float | None = None
    # of the correction, the weights and the filters
    correction_low: float | None = None
    correction_high: float | None = None
    length: int | None = None
    off_policy_limit: float | None = None
    entropy_share: float | None = None
    cov_share: float | None = None
    cov_low: float | None = None
    cov_high: float | None = None
    # of the entropy bonus and of coefficients that adapt
    entropy_coef: float = 0.0
    entropy_steepness: float | None = None
    entropy_target: float | None = None
    entropy_step: float | None = None
    entropy_largest: float | None = None
    kl_target: float | None = None
    kl_gain: float | None = None
    penalty_target: float | None = None

    def __post_init__(self) -> None:
        if self.kl_coef < 0:
            raise ConfigError(f"{self.kl_coef} given, wanted 0 (no KL) or more", where="kl_coef")
        self._check_controls()
        if self.kl_coef and self.kl == "k1" and self.kl_placement == "loss":
            why = "k1 in the loss has a gradient of expectation 0: it would only add noise"
            raise ConfigError(why, where="kl", remedy="use kl: k2, or kl_placement: reward")
        if self.kl_coef and self.kl_placement == "reward" and "log_ratio" in takes(load_row("kl", self.kl)):
            why = f"{self.kl} corrects a loss by the ratio; in a reward there is no ratio"
            raise ConfigError(why, where="kl", remedy="use kl: k1")
        taken = {name for function in chosen(self).values() for name in keywords(function)}
        idle = [name for name in PARAMETERS if getattr(self, name) is not None and name not in taken]
        if self.whiten != "none" and "epsilon" in idle:
            idle.remove("epsilon")
        if idle:
            raise ConfigError(f"nothing chosen here takes it: {', '.join(takers(idle[0]))} would", where=idle[0])


    def _check_controls(self) -> None:
        if self.entropy_coef < 0:
            raise ConfigError(f"{self.entropy_coef} given, wanted 0 (no bonus) or more", where="entropy_coef")
        for name in CONTROLS:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{value} given, wanted a positive number, or null", where=name)
        if self.entropy_steepness is not None and self.entropy_target is not None:
            why = "the bonus follows the spread of rewards or a target entropy, not both"
            raise ConfigError(why, where="entropy_target", remedy="remove entropy_steepness or entropy_target")
        for name, without in (
            ("entropy_steepness", "entropy_coef" if not self.entropy_coef else ""),
            ("entropy_step", "entropy_target" if self.entropy_target is None else ""),
            ("entropy_largest", "entropy_target" if self.entropy_target is None else ""),
            ("kl_target", "kl_coef" if not self.kl_coef else ""),
            ("kl_gain", "kl_target" if self.kl_target is None else ""),
            ("penalty_target", "penalty_coef" if self.surrogate != "kl_penalty" else ""),
        ):
            if getattr(self, name) is not None and without:
                raise ConfigError(f"it would do nothing: there is no {without}", where=name, remedy=f"give {without} too")


CONTROLS = ("entropy_steepness", "entropy_target", "entropy_step", "entropy_largest", "kl_target", "kl_gain", "penalty_target")
NOT_PARAMETERS = {*AXES, *FILTERS, "kl_coef", "kl_placement", "whiten", "entropy_coef", *CONTROLS}
PARAMETERS = tuple(f.name for f in fields(Setting) if f.name not in NOT_PARAMETERS)


def override(setting: Setting, **axes: Any) -> Setting:
    """A setting with other axes: give those that a user wrote, as `core.table.bind` read them, and no others.

    A parameter of a row that is no longer chosen goes with it, unless it is given too.
    Raises ConfigError for what a Setting refuses, and for a KL that is described without a coefficient.
    """
    kept: dict[str, Any] = dict(axes)
    taken = {
        name for function in chosen(replace(setting, **_bare(setting, axes))).values() for name in keywords(function)
    }
    for name in PARAMETERS:
        if name not in axes and getattr(setting, name) is not None and name not in taken:
            kept[name] = None
    if axes.get("surrogate", setting.surrogate) != "kl_penalty":  # the only one with a penalty to adapt
        kept.setdefault("penalty_target", None)
    new = replace(setting, **kept)
    if not new.kl_coef and {"kl", "kl_placement"} & {name for name in axes if axes[name] != getattr(setting, name)}:
        raise ConfigError("there is no KL: kl_coef is 0", where="kl", remedy="give kl_coef, or leave kl out")
    return new


def _bare(setting: Setting, axes: Mapping[str, Any]) -> dict[str, Any]:
    """The axes themselves, every parameter at None and no KL: a setting that cannot be refused."""
    bare = dict.fromkeys((*PARAMETERS, *CONTROLS)) | {"kl_coef": 0.0, "entropy_coef": 0.0}
    return {name: axes[name] for name in (*AXES, *FILTERS) if name in axes} | bare


# ---- what a setting chooses, and what that takes --------------------------------------------------------------------


@lru_cache(maxsize=256)
def takes(function: Callable[..., Any]) -> tuple[str, ...]:
    """Its positional parameters: the columns it reads."""
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY)


@lru_cache(maxsize=256)
def keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    """Its keyword-only parameters: what a setting may give it."""
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY)


@lru_cache(maxsize=256)
def chosen(setting: Setting) -> Mapping[str, Callable[..., Any]]:
    """The live functions of a setting, by axis, filters by their own names; the KL where it has a coefficient."""
    found = {axis: load_row(axis, getattr(setting, axis)) for axis in AXES if axis != "kl" or setting.kl_coef}
    if "high_covariance" in takes(found["surrogate"]):
        found["high_covariance"] = high_covariance
    return found | {name: load_row(kind, name) for kind in FILTERS for name in getattr(setting, kind)}


def takers(parameter: str) -> list[str]:
    """`axis: row` of every row that takes a parameter."""
    tables = [(kind, load_table(kind)) for kind in (*AXES, *FILTERS)]
    return [f"{kind}: {name}" for kind, table in tables for name, row in table.items() if parameter in keywords(row)]


def needs(setting: Setting) -> frozenset[str]:
    """The columns that `prepare` and `objective_of` together want for a setting; token_reward may stay away."""
    found = {name for function in chosen(setting).values() for name in takes(function)} | {"unit", "known"}
    if "token_reward" in found:
        found = (found - {"token_reward"}) | {"reward"}
    if setting.kl_coef and setting.kl_placement == "reward":
        found |= {"reward", "old_logprobs"}
    if setting.entropy_target is not None:
        found |= {"entropy"}
    if setting.entropy_steepness is not None:
        found |= {"reward"}
    return frozenset(found - MADE)


def couples_sequences(setting: Setting) -> bool:
    """Whether the loss of a label depends on the other labels of its sequence, so that the head keeps them together."""
    return any("unit" in takes(function) for function in _in_the_loss(setting))


def _in_the_loss(setting: Setting) -> list[Callable[..., Any]]:
    functions = chosen(setting)
    late = [functions[name] for name in setting.token_filters if "logprobs" in takes(functions[name])]
    return [functions["ratio"], functions["surrogate"], *late]


def _call(function: Callable[..., Any], columns: Mapping[str, Tensor], setting: Setting) -> Tensor:
    if missing := [name for name in takes(function) if name not in columns]:
        raise _missing(getattr(function, "__name__", "a row"), missing[0], columns)
    given = {name: getattr(setting, name, None) for name in keywords(function)}
    return function(*(columns[name] for name in takes(function)), **{k: v for k, v in given.items() if v is not None})


def _missing(who: str, column: str, columns: Mapping[str, Tensor]) -> ConfigError:
    remedy = f"the columns are: {', '.join(sorted(columns))}"
    message = f"{who} takes {column!r}, which is not among the columns"
    return ConfigError(message, where="policy gradient", remedy=remedy)


# ---- the whole batch, once ------------------------------------------------------------------------------------------


def advantages_of(setting: Setting, columns: Mapping[str, Tensor]) -> Float[Tensor, "m"]:
    """The advantage of every label: KL folded into the reward, the row's credit, whitening; 0 where no reward is known.

    Raises ConfigError where a column is missing or units are whitened of a row that credits tokens.
    """
    unit, known = columns["unit"], columns["known"]
    here = {**columns, "length": unit.bincount(minlength=len(known))}
    functions = chosen(setting)
    row = functions["advantage"]
    by_token = {"token_reward", "unit"} & set(takes(row))
    if setting.kl_coef and setting.kl_placement == "reward":
        token_kl = _call(functions["kl"], {**columns, "logprobs": columns["old_logprobs"]}, setting)
        here |= with_kl(here, token_kl, setting.kl_coef)
    if "token_reward" not in here and "reward" in here:
        here["token_reward"] = token_rewards(here["reward"], unit)
    found = _call(row, here, setting)
    scale = {} if setting.epsilon is None else {"epsilon": setting.epsilon}
    if setting.whiten == "units":
        if by_token:
            why = f"{setting.advantage} credits tokens, not units"
            raise ConfigError(why, where="whiten", remedy="use whiten: tokens")
        found = whiten(found, known, **scale)
    found = torch.where(known[unit], found if by_token else found[unit], 0.0)
    return whiten(found, known[unit], **scale) if setting.whiten == "tokens" else found


def prepare(setting: Setting, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an objective captures, for the whole batch and without a gradient; all [m].

    `advantage`; `weight`, 0 for sequences that are left out (they stay in the normaliser); `policy_weight`, the
    correction times the token filters that do not look at the current policy; and `high_covariance` where the
    surrogate takes it. Raises ConfigError where a column of `needs` is missing, or as `advantages_of`.
    """
    paid = {"reward"} if "token_reward" in columns else set[str]()
    if missing := sorted(needs(setting) - columns.keys() - paid):
        raise _missing("this setting", missing[0], columns)
    functions, unit = chosen(setting), columns["unit"]
    with torch.no_grad():
        made = {**columns, "advantage": advantages_of(setting, columns)}
        weight = _call(functions["weights"], made, setting)
        for name in setting.sequence_filters:
            weight = torch.where(_call(functions[name], made, setting)[unit], weight, 0.0)
        policy_weight = _call(functions["correction"], made, setting)
        for name in setting.token_filters:
            if "logprobs" not in takes(functions[name]):
                policy_weight = torch.where(_call(functions[name], made, setting), policy_weight, 0.0)
        out = {"advantage": made["advantage"], "weight": weight, "policy_weight": policy_weight}
        if "high_covariance" in functions:
            out["high_covariance"] = _call(high_covariance, made, setting)
    return out


# ---- one micro-batch, differentiable --------------------------------------------------------------------------------


def objective_of(setting: Setting, columns: Mapping[str, Tensor]) -> Objective:
    """The loss of a micro-batch: sum_t w_t (policy_weight_t * surrogate_t + kl_coef * KL_t).

    `columns` are [m] of the micro-batch: those of `prepare`, and those of `needs` that the ratio, the surrogate, the
    KL and late token filters take. Raises ConfigError, when called, where one is missing.
    """
    functions = chosen(setting)
    late = [functions[name] for name in setting.token_filters if "logprobs" in takes(functions[name])]
    in_loss = setting.kl_coef != 0 and setting.kl_placement == "loss"
    names = {"weight", "policy_weight", "unit"}.union(
        *map(takes, [*_in_the_loss(setting), *([functions["kl"]] if in_loss else [])])
    )
    captured = {name: columns[name] for name in names if name in columns}

    def objective(logprobs: Tensor, entries: slice) -> Tensor:
        here = {name: column[entries] for name, column in captured.items()}
        here |= {name: column.to(logprobs) for name, column in here.items() if column.is_floating_point()}
        here["logprobs"] = logprobs
        here["log_ratio"] = _call(functions["ratio"], here, setting)
        loss = here["policy_weight"] * _call(functions["surrogate"], here, setting)
        for function in late:
            loss = torch.where(_call(function, here, setting), loss, 0.0)
        if in_loss:
            loss = loss + setting.kl_coef * _call(functions["kl"], here, setting)
        return (here["weight"] * loss).sum()

    return objective
