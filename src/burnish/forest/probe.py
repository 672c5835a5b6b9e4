"""Whether a model shares prefixes exactly: asked of the model itself, once, at load.

A list of architectures would be wrong in silence: one that ignores the registered function runs without any mask, and
one that hides more than it tells its attention runs with too little. Both look plausible (relative errors 0.1 to 0.9).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch and transformers ship partial stubs)

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.forest.attention import NAME, Forest, register
from burnish.forest.stream import Layout

_LAYERS = {"full_attention", "sliding_attention"}
MOST_ROUNDING = 1e-1  # where the errors of wrong masks begin
_FOREST = Layout((5, 3, 4, 6), (-1, 0, 0, -1))


class _Watched(Forest):
    """A forest that remembers the window each call was given."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.windows: list[int | None] = []

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self.windows.append(window)
        return super().__call__(layer, q, k, v, scale, window, softcap, sinks)


def why_not(model: torch.nn.Module, body: torch.nn.Module) -> str | None:
    """None if `model`, whose text decoder is `body`, shares prefixes exactly, else the reason to run padded rows.

    Three questions: do the configuration's layer types name only what a layer tells its attention; is each layer's
    window passed on; and do the hidden states of an 18-token forest equal those of its three paths run as separate rows
    (relative norm 1e-3 in float32 and wider; in half precision the median token of each segment, where a router may
    send single tokens elsewhere, within 5e-2, or twice what two attentions of the model's own lie apart on these rows,
    up to 1e-1: how far rounding goes depends on the weights and the processor)? The questions need each other: windows and chunks are
    longer than the probe, and biases and states have no layer type. Leaves the model's mode and attention setting as they were.
    """
    config: Any = getattr(body, "config", None) or model.config
    config = config.get_text_config()
    kinds: list[str] = list(getattr(config, "layer_types", None) or ())
    if odd := sorted(set(kinds) - _LAYERS):
        return f"its {', '.join(odd)} layers do not tell their attention function what they hide"
    low = min(3, config.vocab_size - 1)  # the first ids are padding and marks, which some models treat apart
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(low, min(config.vocab_size, 1000), (_FOREST.size,), generator=generator)
    device = next(body.parameters()).device
    tokens, position = tokens.to(device), _FOREST.position.to(device)
    paths = [_FOREST.rows(leaf).to(device) for leaf in _FOREST.leaves]
    plan = _Watched(_FOREST)
    with _as_it_was(model, body) as switch, torch.no_grad():

        def separate() -> list[Tensor]:
            return [body(input_ids=tokens[path][None], use_cache=False).last_hidden_state[0] for path in paths]

        rows = separate()
        try:
            switch(register())
            given: dict[str, Any] = {"input_ids": tokens[None], "position_ids": position[None]}
            shared = body(**given, plan=plan, use_cache=False).last_hidden_state[0]
        except ConfigError as refusal:
            return f"{refusal.where}: {refusal.message}"
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as reason:
            return str(reason)
    if len(plan.windows) < config.num_hidden_layers:
        return f"only {len(plan.windows)} of {config.num_hidden_layers} layers call the registered attention function"
    if (reason := _windows_untold(config, kinds, plan.windows)) is not None:
        return reason
    error = _worst([shared[path] for path in paths], rows)
    tolerance = 5e-2 if _is_half(shared) else 1e-3
    if _is_half(shared) and tolerance <= error < MOST_ROUNDING:
        with _as_it_was(model, body) as switch, torch.no_grad(), suppress(ImportError, ValueError):
            switch("eager" if config._attn_implementation != "eager" else "sdpa")
            if (own := _worst(separate(), rows)) < MOST_ROUNDING:  # an attention that breaks here says nothing of rounding
                tolerance = min(MOST_ROUNDING, max(tolerance, 2 * own))
    return None if error < tolerance else f"hidden states differ from separate rows by {error:.0e} (allowed: {tolerance:.0e})"


def _windows_untold(config: Any, kinds: list[str], windows: list[int | None]) -> str | None:
    """A window that only the model's mask knows would be lost, and the probe is too short to notice."""
    if kinds and len(kinds) == len(windows):
        for i, (kind, window) in enumerate(zip(kinds, windows)):
            if (kind == "sliding_attention") != (window is not None):
                return f"layer {i} is {kind} and tells its attention function a window of {window}"
    elif (declared := getattr(config, "sliding_window", None)) and all(window is None for window in windows):
        return f"its configuration has a sliding window of {declared} that no layer tells its attention function"
    return None


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _worst(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    return max(_apart(x, y, leaf) for x, y, leaf in zip(got, want, _FOREST.leaves))


def _apart(got: Tensor, want: Tensor, leaf: int) -> float:
    """Largest relative distance of the segments of one path; what is not a number is infinitely far."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    parts = [_FOREST.length[i] for i in [*reversed(_FOREST.ancestors(leaf)), leaf]]
    worst = 0.0
    for x, y in zip(got.double().split_with_sizes(parts), want.double().split_with_sizes(parts)):
        error = ((x - y).norm(dim=-1) / y.norm(dim=-1)).median() if _is_half(got) else (x - y).norm() / y.norm()
        worst = max(worst, float(error))
    return worst


@contextmanager
def _as_it_was(model: torch.nn.Module, body: Any) -> Generator[Callable[[str], None]]:
    """In eval mode and with the model's own attention; yields the switch, and puts mode and setting back."""
    holder: Any = body if hasattr(body, "set_attn_implementation") else model
    configs = list(_configs(holder.config))
    settings = [config._attn_implementation for config in configs]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        body.eval()
        if settings[0] == NAME:
            holder.set_attn_implementation("eager")
        yield holder.set_attn_implementation
    finally:
        for config, setting in zip(configs, settings):  # outer first: setting one sets all below it
            config._attn_implementation = setting
        for module, mode in modes:
            module.training = mode


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            yield from _configs(inner)
