"""Steps of a completion: from places in its text to its tokens, and from process rewards to the reward of each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from burnish.core.records import Scored

Step = tuple[int, float | None]
"""(tokens of the completion up to its end, its reward or None where it has none)"""


def token_ends(decode: Callable[[Sequence[int]], str], ids: Sequence[int], text: str, ends: Sequence[int]) -> list[int]:
    """How many tokens of a completion each step takes to be written out; the last step ends with the completion.

    `ends` are in characters of `text`, ascending, the last one its length. A step ends with the token that completes its
    text: the fewest tokens whose decoding begins with it. A character of several tokens is complete with its last one (a
    part of it decodes to U+FFFD), and a token that reaches over a border belongs to the step before it. What text
    leaves out (the end token, a stop string) belongs to the last step.
    """
    found: list[int] = []
    low = 1
    for end in ends[:-1]:
        wanted, high = text[:end], len(ids)
        while low < high:
            middle = (low + high) // 2
            if decode(ids[:middle]).startswith(wanted):
                high = middle
            else:
                low = middle + 1
        found.append(low)
    return [*found, len(ids)]


def step_rewards(
    components: Mapping[str, Scored], weights: Mapping[str, float], process: frozenset[str], ends: Sequence[int]
) -> tuple[Step, ...]:
    """The reward of each step: the weighted sum of the process rewards, and at the last step of the others too.

    r_j = sum over process rewards of w_k r_kj + [j last] sum over the others of w_k r_k     (section 4.1.3, arXiv:2402.03300)
    A step on which a part abstains or fails has none: None. A component of weight 0 is only recorded.
    """
    counted = {name: one for name, one in components.items() if weights[name]}
    found: list[Step] = []
    for j, end in enumerate(ends):
        parts: list[float | None] = []
        for name, one in counted.items():
            if name in process:
                value = one.spans[j][1] if one.spans else None
            elif j == len(ends) - 1:
                value = one.value
            else:
                continue
            parts.append(None if value is None else weights[name] * value)
        known = [part for part in parts if part is not None]
        found.append((end, sum(known) if known and len(known) == len(parts) else None))
    return tuple(found)
