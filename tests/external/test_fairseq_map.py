"""A user's own map given to fairseq-train: it comes before the rules of the package, and is kept by the run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recorder import durable
from recorder.manifest import Manifest

if importlib.util.find_spec("fairseq") is None:
    pytest.skip("needs fairseq 0.12.2", allow_module_level=True)

pytestmark = pytest.mark.fairseq

MAP = r"""
[[rule]]  # the number of heads is looked up in the live module
pattern = '(?P<attention>decoder\.layers\.(?P<depth>\d+)\.self_attn)\.k_proj\.weight'
component = "cross_key"
stack = "upper"
heads = "num_heads"
"""


def fairseq_train(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join([str(Path(durable.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, "-m", "recorder", "fairseq-train", "--record-dir", str(run), *arguments]
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_a_map_given_to_fairseq_train_says_which_parameter_is_which(
    arguments: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    file, run = tmp_path / "own.toml", tmp_path / "run"
    file.write_text(MAP)
    ended = fairseq_train(
        run,
        *("--record-map", str(file), *arguments["causal"], "--max-update", "1", "--save-dir", str(tmp_path / "saved")),
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    manifest = Manifest.read(run)
    rows = {row.name: row for row in manifest.parameters}
    keys = rows["decoder.layers.1.self_attn.k_proj.weight"]
    assert (keys.layer, keys.component, keys.heads) == ("upper.1", "cross_key", 8)
    # What the map does not speak of is as the package has it.
    queries = rows["decoder.layers.1.self_attn.q_proj.weight"]
    assert (queries.layer, queries.component, queries.heads) == ("decoder.1", "query", 8)
    assert manifest.provenance["map"]["text"] == MAP
    assert "--record-map" not in manifest.trainer.arguments


def test_a_mistake_in_the_map_is_told_before_fairseq_reads_its_data(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(MAP.replace("cross_key", "cross_keys"))
    ended = fairseq_train(tmp_path / "run", "--record-map", str(tmp_path / "own.toml"), str(tmp_path / "nothing"))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        f"python -m recorder: error: {tmp_path / 'own.toml'}: naming rule 1 is not understood: component"
    )
    assert line.endswith("; did you mean 'cross_key' or 'cross_query'?")
    assert not (tmp_path / "run").exists()
