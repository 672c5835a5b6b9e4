"""Coefficients of a setting that move while it trains: state in, state out.

    kl_coef       towards a KL to the reference (`kl_target`, `kl_gain`)         divergences.proportional_coef
    penalty_coef  towards a KL to the old policy (`penalty_target`)              divergences.doubling_coef
    entropy bonus with the spread of rewards (`entropy_steepness`)               entropies.variance_coef
                  towards an entropy (`entropy_target`, `_step`, `_largest`)     entropies.next_control

KL and entropy are in nats a token, means over the tokens of an optimiser batch that is seen for the first time: the
controllers move by relative errors or constant steps, so that another unit only changes the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from burnish.maths.divergences import doubling_coef, proportional_coef
from burnish.maths.entropies import EntropyControl, next_control, variance_coef
from burnish.maths.policy_gradient import Setting
from burnish.maths.surrogates import kl_penalty

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Coefficients:
    """The state: what multiplies the KL to the reference, the penalty of `kl_penalty`, and the entropy."""

    kl: float = 0.0
    penalty: float = 0.0
    entropy: EntropyControl = field(default_factory=EntropyControl)

    @classmethod
    def of(cls, setting: Setting) -> Coefficients:
        """Where a setting starts."""
        own: Any = kl_penalty.__kwdefaults__
        penalty = own["penalty_coef"] if setting.penalty_coef is None else setting.penalty_coef
        return cls(setting.kl_coef, penalty, EntropyControl(setting.entropy_coef))

    def applied(self, setting: Setting) -> Setting:
        """The setting of the next step; the bonus is `entropy.applied`."""
        new: dict[str, Any] = {}
        if setting.kl_target is not None:
            new["kl_coef"] = self.kl
        if setting.penalty_target is not None:
            new["penalty_coef"] = self.penalty
        return replace(setting, **new) if new else setting

    def after_batch(self, setting: Setting, *, kl: float | None, entropy: float | None) -> Coefficients:
        """Moved by what a new batch measured: its KL to the reference for the steps after it, its entropy for its own step."""
        new: dict[str, Any] = {}
        if setting.kl_target is not None and kl is not None:
            gain = {} if setting.kl_gain is None else {"gain": setting.kl_gain}
            new["kl"] = proportional_coef(self.kl, kl, target=setting.kl_target, **gain)
        if setting.entropy_target is not None and entropy is not None:
            given = {"step": setting.entropy_step, "largest": setting.entropy_largest}
            asked = {name: value for name, value in given.items() if value is not None}
            new["entropy"] = next_control(self.entropy, entropy, target=setting.entropy_target, **asked)
        return replace(self, **new)

    def after_round(self, setting: Setting, moved: float) -> Coefficients:
        """Moved by how far a round's steps took the policy: KL(old || policy) over its tokens, after the last of them."""
        if setting.penalty_target is None:
            return self
        return replace(self, penalty=doubling_coef(self.penalty, moved, target=setting.penalty_target))

    def bonus(self, setting: Setting, reward: Float[Tensor, "u"], known: Bool[Tensor, "u"]) -> float:
        """What multiplies the entropy in the next step: fixed, or as one of the two controllers says."""
        if setting.entropy_target is not None:
            return self.entropy.applied
        if setting.entropy_steepness is not None and bool(known.any()):
            return variance_coef(reward, known, largest=setting.entropy_coef, steepness=setting.entropy_steepness)
        return setting.entropy_coef

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Coefficients:
        return cls(value["kl"], value["penalty"], EntropyControl(**value["entropy"]))
