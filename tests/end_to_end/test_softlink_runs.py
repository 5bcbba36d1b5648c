"""The softlink way with the real libraries, in a virtual environment of its own.

The environment holds real copies of transformers and yunchang; everything else (torch, …) it finds in
the running one. Scripts there import nothing of this project.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anchor_context.library_modified_files import softlink_to_library as softlink

SCRIPT = softlink.__file__
POSITIONS = [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]
DOCUMENTS = [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]

# A user's script: a tiny LLaMA, packed positions, nothing of ours.
USER_SCRIPT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5)
model = LlamaForCausalLM(config).double().eval()
ids = torch.arange(3, 14)[None]
positions = torch.tensor([{positions}])
results = {{}}
with torch.no_grad():
    for name in sys.argv[2:]:
        model.set_attn_implementation(name)
        if name == "flex_attention":
            model = model.float()  # FlexAttention on the CPU computes no float64
        results[name] = model(ids, position_ids=positions, use_cache=False).logits
        if name == "sdpa":
            results["cached"] = model(ids, position_ids=positions, use_cache=True).logits
            two = ids.repeat(2, 1)
            results["rows"] = model(two, position_ids=positions.repeat(2, 1), use_cache=False).logits
            padded = torch.tensor([[0, 0] + [1] * 9, [1] * 11])
            results["padded"] = model(two, attention_mask=padded).logits
            results["single"] = model(ids).logits
            results["generated"] = model.generate(ids, max_new_tokens=4, do_sample=False)
torch.save(results, sys.argv[1])
"""

# flash_attention_2 needs a GPU to be switched on in a model; its function is called as a model does.
FLASH_SCRIPT = """
import sys
import torch
from transformers.integrations.flash_attention import flash_attention_forward

torch.manual_seed(0)
q, k, v = torch.randn(1, 4, 11, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8)
class Layer(torch.nn.Module):
    is_causal, layer_idx = True, 0
positions = torch.tensor([{positions}])
edges = torch.tensor([0, 5, 9, 11], dtype=torch.int32)
by_positions, _ = flash_attention_forward(Layer(), q, k, v, None, position_ids=positions)
by_edges, _ = flash_attention_forward(Layer(), q, k, v, None, cu_seq_lens_q=edges)
torch.save((q, k, v, by_positions, by_edges), sys.argv[1])
"""


class Environment:
    """A virtual environment with its own transformers and yunchang."""

    def __init__(self, folder: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        self.site = next((folder / "lib").iterdir()) / "site-packages"
        self.folder = folder
        running = Path(torch.__file__).parents[1]
        (self.site / "running.pth").write_text(f"{running}\n")
        for name in softlink.FILES:
            shutil.copytree(running / name, self.site / name, symlinks=True)
            info = next(running.glob(f"{name}-*.dist-info"))
            shutil.copytree(info, self.site / info.name)

    def run(self, *arguments, code: int = 0, **variables: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        result = subprocess.run(
            [self.python, *arguments],
            env=environment | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout

    def pip_check(self) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.python, "-m", "pip", "check"], cwd=self.folder, capture_output=True, text=True
        )

    def script(self, code: str, *arguments: str, pattern: str = ""):
        """Run a user's script; what it saved."""
        script, saved = self.folder / "script.py", self.folder / "saved.pt"
        script.write_text(code.format(positions=POSITIONS))
        self.run(script, saved, *arguments, ANCHOR_CONTEXT_PATTERN=pattern)
        return torch.load(saved)

    def hashes(self) -> dict[str, str]:
        """Every file of the two libraries, but compiled ones."""
        return {
            str(file.relative_to(self.site)): hashlib.sha256(file.read_bytes()).hexdigest()
            for name in softlink.FILES
            for file in (self.site / name).rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture
def original(environment):
    """The libraries' hashes; whatever the test does, it ends with them."""
    before = environment.hashes()
    yield before
    environment.run(SCRIPT, "restore", "--yes")
    assert environment.hashes() == before


def visible(pattern: str) -> torch.Tensor:
    """(11, 11): who sees whom, written down by hand from the pattern's words."""
    document, index = torch.tensor(DOCUMENTS), torch.arange(11)
    own = document[:, None] == document
    return (index[:, None] >= index) & (own | ((index == 0) & (pattern == "anchor")))


def reference_logits(pattern: str) -> torch.Tensor:
    """The same tiny LLaMA here, dense, with the mask given outright."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        return model(
            torch.arange(3, 14)[None],
            position_ids=torch.tensor([POSITIONS]),
            attention_mask=visible(pattern)[None, None],
        ).logits


def test_an_unmodified_script_attends_by_the_pattern_and_restore_brings_all_back(
    environment, original
):
    # The running environment may have faults of its own: a package without what it requires.
    before = environment.pip_check()
    plain = environment.script(USER_SCRIPT, "sdpa")
    environment.run(SCRIPT, "install", "--yes")
    assert environment.hashes() != original
    anchor = environment.script(USER_SCRIPT, "sdpa", "flex_attention", pattern="anchor")

    expected = reference_logits("anchor")
    exact = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(anchor["sdpa"], expected, **exact)
    torch.testing.assert_close(anchor["cached"], expected, **exact)
    torch.testing.assert_close(anchor["rows"], expected.repeat(2, 1, 1), **exact)
    torch.testing.assert_close(anchor["flex_attention"].double(), expected, rtol=1e-4, atol=1e-4)
    assert (plain["sdpa"] - expected).abs().max() > 0.1  # the library alone has no anchor
    for untouched in ("padded", "single", "generated"):
        assert torch.equal(plain[untouched], anchor[untouched])

    environment.run(SCRIPT, "restore", "--yes")
    assert environment.hashes() == original
    after = environment.pip_check()
    assert (after.returncode, after.stdout) == (before.returncode, before.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["intra_doc", "intra_doc_reset", "off"])
def test_the_other_values_of_the_switch(environment, original, pattern):
    plain = environment.script(USER_SCRIPT, "sdpa")
    environment.run(SCRIPT, "install", "--yes")
    switched = environment.script(USER_SCRIPT, "sdpa", pattern=pattern)
    if pattern == "off":
        assert all(torch.equal(plain[name], switched[name]) for name in plain)
    else:
        expected = reference_logits(pattern)
        for name in ("sdpa", "cached"):
            torch.testing.assert_close(switched[name], expected, rtol=0, atol=1e-10)
        # The library itself lets documents see each other as soon as a cache is on.
        assert (plain["cached"] - expected).abs().max() > 0.1


@pytest.mark.parametrize("pattern", ["anchor", "intra_doc"])
def test_the_flash_function(environment, original, pattern):
    environment.run(SCRIPT, "install", "--yes", "--library", "transformers")
    q, k, v, by_positions, by_edges = environment.script(FLASH_SCRIPT, pattern=pattern)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), visible(pattern), enable_gqa=True
    )
    for out in (by_positions, by_edges):
        torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


ULYSSES_SCRIPT = """
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from yunchang.ulysses import UlyssesAttention, UlyssesFlexAttention, VarLenUlyssesAttention

def rank_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole = [torch.randn(1, 12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    edges = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
    saved = {{}}
    for layer in (VarLenUlyssesAttention, UlyssesFlexAttention):
        part = [x[:, rank * 6 : rank * 6 + 6].clone().requires_grad_() for x in whole]
        out = layer()(*part, edges)
        out.square().sum().backward()
        saved[layer.__name__] = (out.detach(), [x.grad for x in part])
    torch.save((whole, saved), f"{{folder}}/rank{{rank}}.pt")
    dist.destroy_process_group()

if __name__ == "__main__":
    import tempfile
    folder = tempfile.mkdtemp()
    mp.spawn(rank_of_two, (folder,), nprocs=2)
    torch.save([torch.load(f"{{folder}}/rank{{r}}.pt") for r in (0, 1)], sys.argv[1])
"""


def test_yunchang_gains_ulysses_layers_by_document(environment, original):
    environment.run(SCRIPT, "install", "--yes", "--library", "yunchang")
    (whole, first), (_, second) = environment.script(ULYSSES_SCRIPT)
    document, index = torch.tensor([0] * 5 + [1] * 4 + [2] * 3), torch.arange(12)
    causal = index[:, None] >= index
    own = causal & (document[:, None] == document)
    masks = {"VarLenUlyssesAttention": own, "UlyssesFlexAttention": own | (causal & (index == 0))}
    for name, mask in masks.items():
        qkv = [x.clone().requires_grad_() for x in whole]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in qkv), mask, enable_gqa=True
        ).transpose(1, 2)
        expected.square().sum().backward()
        out = torch.cat([first[name][0], second[name][0]], dim=1)
        torch.testing.assert_close(out, expected.detach())
        for x, a, b in zip(qkv, first[name][1], second[name][1], strict=True):
            torch.testing.assert_close(torch.cat([a, b], dim=1), x.grad)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["install", "restore"])
def test_after_a_kill_at_every_file_the_real_libraries_run(environment, original, action):
    """SIGKILL just before each file changes hands; a user's script runs right after it."""
    files = sum(len(files) for files in softlink.FILES.values())
    for n in range(files):
        environment.run(SCRIPT, "install" if action == "restore" else "restore", "--yes")
        program = (
            f"import os, signal, sys; sys.path.insert(0, {str(Path(SCRIPT).parent)!r})\n"
            "import softlink_to_library as softlink\n"
            f"replace, left = os.replace, [{n}]\n"
            "def killing(source, target):\n"
            "    is_target = not str(target).endswith('_pristine.py')\n"
            "    if is_target and not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    left[0] -= is_target\n"
            "    replace(source, target)\n"
            "os.replace = killing\n"
            f"softlink.main([{action!r}, '--yes'])"
        )
        environment.run("-c", program, code=-signal.SIGKILL)
        linked = sum(p.is_symlink() for p in environment.site.rglob("*.py"))
        assert linked == (n if action == "install" else files - n)
        environment.run("-c", "import yunchang, transformers.integrations.flash_attention")
        assert environment.script(USER_SCRIPT, "sdpa")["sdpa"].isfinite().all()
        environment.run(SCRIPT, action, "--yes")
        installed = sum(p.is_symlink() for p in environment.site.rglob("*.py"))
        assert installed == (files if action == "install" else 0)
        if action == "restore":
            assert environment.hashes() == original
