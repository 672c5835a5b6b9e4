"""The named points of the policy-gradient grid: each method as published, one declaration a method.

What differs between two of them is what their declarations differ in: `burnish show dapo --vs grpo`. Any axis may be
given another value (`policy_gradient.override`). `bias` says how the expected gradient differs from that of the
expected reward where the policy is still the one that sampled.
"""

from __future__ import annotations

from burnish.core.table import About, Table
from burnish.maths.policy_gradient import Setting

REINFORCE = Setting(advantage="ema", ratio="none", surrogate="reinforce", weights="sequence_sum")
"""REINFORCE with a moving-average baseline: loss = - (r - b) log p(y).

    d J = E[(r - b) d log p(y)],   b from earlier batches      (Williams 1992; for language models arXiv:2402.14740)
"""

REINFORCE_PP = Setting(
    advantage="to_go", whiten="tokens", kl="k1", kl_coef=0.01, kl_placement="reward", weights="token_mean"
)
"""REINFORCE++: KL by token in the reward, advantages whitened over the whole batch, PPO's clip; no critic, no groups.

    A_t = r - beta sum_(i >= t) KL_i, then (A - mean) / std over the batch's tokens      (arXiv:2501.03262)
"""

RLOO = Setting(
    advantage="leave_one_out",
    ratio="none",
    surrogate="reinforce",
    kl="k1",
    kl_coef=0.05,
    kl_placement="reward",
    weights="sequence_sum",
)
"""REINFORCE leave-one-out: each sample's baseline is the mean of the prompt's other samples.

    A_i = R_i - mean over j != i of R_j,   R = r - beta log p/p_ref of the whole completion      (arXiv:2402.14740)
Beside `reinforce`: the baseline knows the prompt. It is unbiased for the reward less its KL.
"""

REMAX = Setting(advantage="greedy_baseline", ratio="none", surrogate="reinforce", weights="sequence_sum")
"""ReMax, or self-critical training: the baseline is the reward of the greedy answer.

    d J = E[(r(y) - r(greedy)) d log p(y)]      (arXiv:2310.10505; arXiv:1612.00563)
Beside `rloo`: one sample and one greedy answer a prompt instead of a group.
"""

A2C = Setting(advantage="gae", lam=1.0, ratio="none", surrogate="reinforce", weights="sequence_sum")
"""Advantage actor-critic: the return minus the critic's value, one step a batch.

    A_t = G_t - V(s_t)      (arXiv:1602.01783; n-step with n the rest of the completion)
Beside `ppo`: no ratio and no clip. The critic's squared loss is `values.squared`.
"""

PPO = Setting(
    advantage="gae",
    gamma=1.0,
    lam=0.95,
    whiten="tokens",
    clip_low=0.2,
    clip_high=0.2,
    kl="k1",
    kl_coef=0.05,
    kl_placement="reward",
    weights="token_mean",
)
"""Proximal policy optimisation: GAE over a critic, clipped ratio to the *old* policy, KL to a reference in the reward.

    loss = - min(rho A, clip(rho, 1 - eps, 1 + eps) A)   (eq. 7, arXiv:1707.06347; with a reference: arXiv:2203.02155)
"""

PPO_KL = Setting(
    advantage="gae",
    gamma=1.0,
    lam=0.95,
    whiten="tokens",
    surrogate="kl_penalty",
    penalty_coef=1.0,
    penalty_target=0.01,
    kl="k1",
    kl_coef=0.05,
    kl_placement="reward",
    weights="token_mean",
)
"""PPO with a KL penalty to the old policy in place of the clip; with `penalty_target` its coefficient adapts.

    loss = - rho A + beta KL(old || policy)      (eq. 8 and section 4, arXiv:1707.06347; target 0.01 a token)
"""

GRPO = Setting(
    advantage="group_standardised",
    clip_low=0.2,
    clip_high=0.2,
    kl="k3",
    kl_coef=0.04,
    weights="sequence_mean",
)
"""Group relative policy optimisation: rewards in standard deviations of the prompt's group, no critic.

    A_i = (r_i - mean r) / (std r + eps);  loss = mean_i 1/|y_i| sum_t [- clip loss + beta k3]   (eq. 3, arXiv:2402.03300)
The division by length and by deviation are the published biases: `dr_grpo` drops both, `dapo` the first.
"""

GRPO_PROCESS = Setting(
    advantage="process",
    clip_low=0.2,
    clip_high=0.2,
    kl="k3",
    kl_coef=0.04,
    weights="sequence_mean",
)
"""GRPO with process supervision: step rewards standardised over the group's steps, credit back from each step's end.

    A_t = sum over steps that end at or after t of (r_j - mean) / (std + eps)      (section 4.1.3, arXiv:2402.03300)
Beside `grpo`: equal to it with one step a completion, ending at its last token. Its rewards score steps, which
`rewards.steps` cuts: `task_steps`, or a function of yours that takes `steps`.
"""

DR_GRPO = Setting(advantage="group_centred", clip_low=0.2, clip_high=0.2, weights="fixed_length")
"""GRPO done right: no division by the group's deviation, one constant length for all, no KL.

    A_i = r_i - mean r;  loss = 1 / (S L) sum_i sum_t clip loss      (arXiv:2503.20783)
"""

DAPO = Setting(
    advantage="group_standardised",
    clip_low=0.2,
    clip_high=0.28,
    weights="token_mean",
    sequence_filters=("dead_groups",),
)
"""DAPO: a higher upper clip, every token weighs alike, groups of equal rewards left out, no KL.

    loss = 1 / sum |y_i| sum_i sum_t - min(rho A, clip(rho, 1 - 0.2, 1 + 0.28) A)      (eq. 8, arXiv:2503.14476)
Drawing other prompts for dead groups and the price of long completions belong to the rollouts: the paper's are
`rollouts: {refill: 10, overlong_cushion: <a fifth of max_new_tokens>}`, as the recipe policy_gradient/dapo has them.
"""

GSPO = Setting(advantage="group_standardised", ratio="sequence", clip_low=3e-4, clip_high=4e-4, weights="sequence_mean")
"""Group sequence policy optimisation: one length-normalised ratio a sequence, clipped as a whole.

    s_i = (p(y_i) / p_old(y_i))^(1 / |y_i|);  loss = - min(s A, clip(s) A)      (eq. 5, arXiv:2507.18071)
Beside `grpo`: equal at one token a completion, up to clip and KL. With weights: sequence_sum it is LUSPO.
"""

GSPO_TOKEN = Setting(
    advantage="group_standardised", ratio="sequence_token", clip_low=3e-4, clip_high=4e-4, weights="sequence_mean"
)
"""GSPO whose gradient goes through each token's own log-prob, so that advantages may differ by token.

    s_t = sg[s] p(y_t) / sg[p(y_t)]      (eq. 13, arXiv:2507.18071)
"""

CISPO = Setting(advantage="group_standardised", surrogate="cispo", ratio_max=5.0, weights="token_mean")
"""CISPO: the importance weight is cut and stopped, so every token keeps a gradient.

    loss = - sg[min(rho, max)] A log p, over all tokens alike      (eq. 4, arXiv:2506.13585)
"""

GMPO = Setting(advantage="group_standardised", surrogate="gmpo", log_clip=0.4, weights="sequence_mean")
"""Geometric-mean policy optimisation: a sequence's weight is the geometric mean of its clipped token ratios.

    loss = - A (prod_t clipped rho_t)^(1 / |y|)      (arXiv:2507.20673)
"""

SAPO = Setting(
    advantage="group_standardised", surrogate="sapo", tau_positive=1.0, tau_negative=1.05, weights="sequence_mean"
)
"""Soft adaptive policy optimisation: a sigmoid gate in place of the clip, steeper for negative advantages.

    loss = - (4 / tau) sigmoid(tau (rho - 1)) A      (arXiv:2511.20347)
"""

OPO = Setting(advantage="length_weighted_optimal", ratio="none", surrogate="reinforce", weights="sequence_sum")
"""On-policy with the optimal reward baseline: the group's mean weighted by length, one step a batch, no clip, no KL.

    A_i = r_i - sum l_j r_j / sum l_j      (arXiv:2505.23585)
"""

GDPO = Setting(advantage="per_reward_normalised", clip_low=0.2, clip_high=0.2, weights="sequence_mean")
"""Group reward-decoupled normalisation: several rewards, each standardised in its group before they are summed.

    A_i = (sum_c w_c (r_ic - mean) / std) / std over the batch      (arXiv:2601.05242)
"""

KL_COV = Setting(
    advantage="group_standardised", surrogate="kl_cov", cov_penalty=1.0, cov_share=2e-4, weights="token_mean"
)
"""KL-Cov: the tokens of highest covariance of log-prob and advantage pay for moving; the others are free and unclipped.

    loss = - rho A + beta |log rho| on the top share      (arXiv:2505.22617)
"""

CLIP_COV = Setting(
    advantage="group_standardised",
    clip_low=0.2,
    clip_high=0.2,
    token_filters=("clip_cov",),
    cov_share=2e-4,
    cov_low=1.0,
    cov_high=5.0,
    weights="token_mean",
)
"""Clip-Cov: a few random tokens of high covariance of log-prob and advantage get no gradient.

    loss = clip loss, 0 on a share drawn among cov in (1, 5)      (arXiv:2505.22617)
"""

POLICY_GRADIENT = Table(
    "method",
    {
        "reinforce": REINFORCE,
        "reinforce_pp": REINFORCE_PP,
        "rloo": RLOO,
        "remax": REMAX,
        "a2c": A2C,
        "ppo": PPO,
        "ppo_kl": PPO_KL,
        "grpo": GRPO,
        "grpo_process": GRPO_PROCESS,
        "dr_grpo": DR_GRPO,
        "dapo": DAPO,
        "gspo": GSPO,
        "gspo_token": GSPO_TOKEN,
        "cispo": CISPO,
        "gmpo": GMPO,
        "sapo": SAPO,
        "opo": OPO,
        "gdpo": GDPO,
        "kl_cov": KL_COV,
        "clip_cov": CLIP_COV,
    },
    also={
        "reinforce++": "reinforce_pp",
        "reinforce_plus_plus": "reinforce_pp",
        "scst": "remax",
        "self_critical": "remax",
        "actor_critic": "a2c",
        "drgrpo": "dr_grpo",
        "geo_mean": "gmpo",
    },
    about={
        "reinforce": About(taxonomy=("F4",), paper="arXiv:2402.14740", year=2024, bias="none"),
        "reinforce_pp": About(
            taxonomy=("P11",),
            paper="arXiv:2501.03262",
            year=2025,
            bias="whitening contains the sample; divided by the batch's number of tokens, which depends on the samples",
        ),
        "rloo": About(taxonomy=("P10",), paper="arXiv:2402.14740", year=2024, bias="none"),
        "remax": About(taxonomy=("F6", "P12"), paper="arXiv:2310.10505", year=2023, bias="none"),
        "a2c": About(taxonomy=("F8",), paper="arXiv:1602.01783", year=2016, bias="none"),
        "ppo": About(
            taxonomy=("P2", "P5"),
            paper="arXiv:1707.06347",
            year=2017,
            bias="the critic's error where lam < 1; whitening; divided by the batch's number of tokens",
        ),
        "ppo_kl": About(
            taxonomy=("P3",),
            paper="arXiv:1707.06347",
            year=2017,
            bias="the critic's error where lam < 1; whitening; divided by the batch's number of tokens",
        ),
        "grpo": About(
            taxonomy=("P8",),
            paper="arXiv:2402.03300",
            year=2024,
            bias="divided by the group's deviation and the sequence's length; k3 in the loss pulls by the forward KL",
        ),
        "grpo_process": About(
            taxonomy=("P9",),
            paper="arXiv:2402.03300",
            year=2024,
            bias="divided by the deviation of the group's steps and the length; k3 in the loss pulls by the forward KL",
        ),
        "dr_grpo": About(
            taxonomy=("Z2",),
            paper="arXiv:2503.20783",
            year=2025,
            bias="only in scale: (n - 1) / n for groups of n, over a constant length",
        ),
        "dapo": About(
            taxonomy=("Z1",),
            paper="arXiv:2503.14476",
            year=2025,
            bias="divided by the group's deviation and the batch's number of tokens",
        ),
        "gspo": About(
            taxonomy=("Z3",),
            paper="arXiv:2507.18071",
            year=2025,
            bias="divided by the group's deviation and the sequence's length",
        ),
        "gspo_token": About(
            taxonomy=("Z3",),
            paper="arXiv:2507.18071",
            year=2025,
            bias="divided by the group's deviation and the sequence's length",
        ),
        "cispo": About(
            taxonomy=("Z4",),
            paper="arXiv:2506.13585",
            year=2025,
            bias="divided by the group's deviation and the batch's number of tokens; weights cut above",
        ),
        "gmpo": About(
            taxonomy=("Z5",),
            paper="arXiv:2507.20673",
            year=2025,
            bias="divided by the group's deviation and the sequence's length",
        ),
        "sapo": About(
            taxonomy=("Z6",),
            paper="arXiv:2511.20347",
            year=2025,
            bias="divided by the group's deviation and the sequence's length; a gate that is not the ratio",
        ),
        "opo": About(
            taxonomy=("Z9",),
            paper="arXiv:2505.23585",
            year=2025,
            bias="the baseline contains the sample's own reward, by length",
        ),
        "gdpo": About(
            taxonomy=("Z8", "R20"),
            paper="arXiv:2601.05242",
            year=2026,
            bias="divided by deviations of group and batch, and by the sequence's length",
        ),
        "kl_cov": About(
            taxonomy=("Z11",),
            paper="arXiv:2505.22617",
            year=2025,
            bias="divided by the group's deviation and the batch's number of tokens",
        ),
        "clip_cov": About(
            taxonomy=("Z11",),
            paper="arXiv:2505.22617",
            year=2025,
            bias="divided by the group's deviation and the batch's number of tokens; tokens dropped by covariance",
        ),
    },
)
