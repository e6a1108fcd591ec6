"""Real kills at random moments of a short atlas: resumed, it equals the undisturbed one bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 20

# In a process of its own, which loads once and forks for every run: torch's threads do not survive a fork.
DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import headwise as hw
from headwise.atlas import atlas
from headwise.atlas.progress import Silent
from headwise.find.method import Method, scored_sites
from headwise.probes import probe
from headwise.zoo.planted import planted

def score(model, items):
    shapes = {site: (len(items), model.table.site(site).n_heads) for site in scored_sites(model)}
    drawn = {site: torch.Generator().manual_seed(site.layer) for site in shapes}
    return {site: torch.rand(shape, generator=drawn[site]) for site, shape in shapes.items()}

methods = [
    Method(id=id, title=id, page="none.md", paper="none", year=2024, tier="C", status="exact", needs=("answer",),
           cost="none", probe="repeat", score=score)
    for id in ("one", "two")
]
SETTING

def run(folder):
    atlas(model, folder, probes=probes, methods=methods, items=16, controls=20, watching=Silent())

out, kills = Path(sys.argv[1]), int(sys.argv[2])
began = time.monotonic()
run(out / "undisturbed")
whole = time.monotonic() - began
draw, done, number = random.Random(0), 0, 0
while done < kills:
    number += 1
    child = os.fork()
    if not child:
        try:
            run(out / f"killed-{done // 5}")
        finally:
            os._exit(0)
    time.sleep(draw.uniform(0, whole / 3))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    done += os.WIFSIGNALED(status)
    if number > 20 * kills:
        sys.exit("the runs end before they can be killed")
for folder in sorted(out.glob("killed-*")):
    run(folder)
print(done)
"""


TEXT = """
organism = planted("llama", layers=2, heads=4, circuits=("induction",), seed=0)
model = hw.attach(organism.model, organism.tokenizer, example=organism.example, name="small")
probes = [probe("repeat").over(words=(8, 16)), "choice"]
"""

PICTURES = """
sys.path.insert(0, sys.argv[3])
import conftest
model = conftest.one_that_sees()
probes = [conftest.made_probe("shown", conftest.asked(model, 40)), conftest.SHORT]
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("setting", [TEXT, PICTURES], ids=["text", "pictures"])
def test_twenty_kills(tmp_path: Path, setting: str) -> None:
    here, driver = str(Path(__file__).parent), DRIVER.replace("SETTING", setting)
    done = subprocess.run(
        [sys.executable, "-c", driver, str(tmp_path), str(KILLS), here], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == KILLS
    undisturbed = kept(tmp_path / "undisturbed")
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) == KILLS // 5
    for folder in killed:
        assert kept(folder) == undisturbed, folder
        cells = [line["cell"] for line in log(folder) if line["event"] == "cell"]
        assert len(cells) == len(set(cells)), "a finished cell was measured again"
        assert sum(line["event"] == "began" for line in log(folder)) > 1


def kept(folder: Path) -> dict[str, bytes]:
    return {
        str(each.relative_to(folder)): each.read_bytes()
        for each in sorted(folder.rglob("*"))
        if each.is_file() and each.name not in ("log.jsonl", ".lock")
    }


def log(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
