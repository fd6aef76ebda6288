"""Quantise a checkpoint to NVFP4 and generate with it.

    python examples/quantize_and_run.py

Shows: `quantize_checkpoint` on a Hugging Face folder (here a small model with random weights), the error it reports,
and the quantised model reading the same prompt. On the command line: hybrid-ops quantize FOLDER --format nvfp4.
"""

import tempfile
from pathlib import Path

import torch

from hybrid_ops.models import NemotronHConfig, NemotronHForCausalLM, quantize_checkpoint

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

with tempfile.TemporaryDirectory() as temporary:
    source, quantized = Path(temporary, "Tiny-BF16"), Path(temporary, "Tiny-NVFP4")
    NemotronHForCausalLM(NemotronHConfig.preset("tiny-moe"), dtype=torch.bfloat16).save_pretrained(source)

    report = quantize_checkpoint(source, quantized, format="nvfp4")
    print(f"{report.bytes_before:,} bytes became {report.bytes_after:,}")
    for name in sorted({row.format for row in report.rows}):
        errors = [row.error for row in report.rows if row.format == name]
        print(f"{name}: relative error of the weights up to {max(errors):.3f} in {len(errors)} rows")

    before = NemotronHForCausalLM.from_pretrained(source, device=device)
    after = NemotronHForCausalLM.from_pretrained(quantized, device=device)

kinds = sorted({type(module).__name__ for module in after.modules() if "Nvfp4" in type(module).__name__})
print(f"modules with NVFP4 weights, kept as they are on disk: {', '.join(kinds)}")

prompt = torch.tensor([list(b"Once upon a time")], device=device)
with torch.no_grad():
    a, b = before(prompt).float(), after(prompt).float()
print(f"logits: {(a - b).norm() / a.norm():.3f} away from the bfloat16 model's")
print("generated:", after.generate(prompt, 8).tolist()[0])
