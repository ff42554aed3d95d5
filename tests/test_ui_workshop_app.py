"""The Workshop tab as programs meet it: the real app, the embedded demo, Gradio's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError

from nodes.engine.dataset import scan
from nodes.engine.finetune import train
from nodes.engine.lora_file import read, write
from nodes.engine.train_state import whole_state
from nodes.lora import DEMO_ADAPTERS

from .engine.test_finetune import settings, tiny_base, write_items
from .ui_server import Server, serving

LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("workshop") / "app"
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 192, generator=generator), torch.randn(192, 6, generator=generator)
    (folder / "loras" / "mine").mkdir(parents=True)
    write(folder / "loras" / "mine" / "six.safetensors", {LAYER: (a, b)}, 6, {}, torch.float32)
    with serving(folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return Client(server.url, verbose=False)


def there(server: Server) -> set[str]:
    """Every file below the app's folder that a tool may have written."""
    return {path.relative_to(server.folder).as_posix() for path in server.folder.rglob("*")
            if path.is_file() and path.suffix != ".txt" and "cache" not in path.parts}  # fmt: skip


def fetched(server: Server, file: dict[str, str]) -> bytes:
    answer = httpx.get(server.url + file["url"])
    assert answer.status_code == 200
    assert file["name"] in unquote(answer.headers["content-disposition"])
    return answer.content


def delta(path: Path, layer: str = LAYER) -> torch.Tensor:
    (module,) = [one for one in read(path).modules if one.path == layer]
    return module.dense(torch.zeros(module.shape))


def test_two_adapters_become_one_that_is_listed_and_can_be_fetched(client: Client, server: Server):
    made = client.predict(["neon:0.5", "sunset:1"], "both/../of them", api_name="/workshop_merge")
    assert made["name"] == "both-..-of them"  # a name, and no way out of the folder
    (file,) = made["files"]
    path = server.folder / "loras" / f"{made['name']}.safetensors"
    assert fetched(server, file) == path.read_bytes()
    assert made["name"] in [row["title"] for row in client.predict(api_name="/adapters")]
    neon, sunset = (delta(DEMO_ADAPTERS / f"{name}.safetensors") for name in ("neon", "sunset"))
    assert torch.allclose(delta(path), neon / 2 + sunset, atol=1e-6)
    # The same again is another file: nothing is replaced.
    again = client.predict(["neon:0.5", "sunset:1"], "both/../of them", api_name="/workshop_merge")
    assert again["name"] == f"{made['name']}-2"


def test_one_becomes_smaller_and_says_what_it_cost(client: Client, server: Server):
    values = client.predict("neon", api_name="/workshop_spectrum")
    assert {len(found) for found in values.values()} == {8}
    assert all(found == sorted(found, reverse=True) for found in values.values())
    made = client.predict("neon", "tiny neon", 2, api_name="/workshop_resize")
    whole, kept = (sum(one**2 for found in values.values() for one in found[:ranks]) for ranks in (8, 2))
    assert made["energy"] == pytest.approx(kept / whole, abs=1e-3)
    assert made["ranks"] == [2, 2]
    assert made["ranks_before"] == 4 * made["ranks_after"]
    assert list(made["blocks"]) == [str(block) for block in range(6)]
    size = (server.folder / "loras" / "tiny neon.safetensors").stat().st_size
    assert made["target_bytes"] == size < made["source_bytes"] / 2
    assert made["target"] == "tiny neon.safetensors"


def test_what_was_baked_is_extracted_again(client: Client, server: Server):
    made = client.predict(["neon:0.7"], "cogloom-demo", "bright", "fp32", api_name="/workshop_bake")
    folder = server.folder / "output" / "diffusion_models" / "bright"
    assert {file["name"] for file in made["files"]} == {path.name for path in folder.iterdir()}
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= {file["name"] for file in made["files"]}
    for file in made["files"]:
        assert fetched(server, file) == (folder / file["name"]).read_bytes()
    assert "diffusion_models/bright" in client.predict(api_name="/workshop_sources")["finetuned"]
    write_items(server.folder / "data" / "seen", clips=1)
    back = client.predict("diffusion_models/bright", "cogloom-demo", "back", 8, dtype="fp32", heldout="seen",
                          api_name="/workshop_extract")  # fmt: skip
    means = back["losses"]["means"]
    assert means["extracted"] == pytest.approx(means["fine-tuned"], rel=1e-3)
    assert abs(means["base"] - means["fine-tuned"]) > abs(means["extracted"] - means["fine-tuned"])
    neon = delta(DEMO_ADAPTERS / "neon.safetensors")
    found = delta(server.folder / "loras" / "back.safetensors")
    assert (found - 0.7 * neon).norm() < 1e-3 * neon.norm()
    assert back["error"] < 1e-3
    assert back["target_bytes"] < back["source_bytes"] / 10


@pytest.mark.parametrize("layout", ["diffusers", "peft", "kohya", "comfyui", "sat"])
def test_a_layout_of_another_program_holds_the_same(client: Client, server: Server, layout: str):
    before = {row["title"] for row in client.predict(api_name="/adapters")}
    name = "mine/six.safetensors" if layout == "sat" else "neon"  # SAT has adapters for the attention alone
    made = client.predict(name, layout, "", api_name="/workshop_convert")
    path = server.folder / "output" / "converted" / made["name"]
    assert path.is_dir() == (layout == "peft")
    weights = next(path.glob("*.safetensors")) if path.is_dir() else path
    source = server.folder / "loras" / name if layout == "sat" else DEMO_ADAPTERS / "neon.safetensors"
    assert torch.equal(delta(weights), delta(source))
    assert [file["name"] for file in made["files"]] == (sorted(one.name for one in path.iterdir())
                                                        if path.is_dir() else [path.name])  # fmt: skip
    assert {row["title"] for row in client.predict(api_name="/adapters")} == before


def test_a_runs_adapter_is_taken_out(client: Client, server: Server):
    run = server.output / "training" / "waves"
    for step, loss in ((50, 0.5), (100, 0.4), (150, 0.6)):
        folder = run / f"checkpoint-{step:06}"
        folder.mkdir(parents=True)
        a, b = torch.randn(4, 192), torch.randn(192, 4)
        write(folder / "adapter.safetensors", {LAYER: (a, b)}, 4, {}, torch.float32)
        state = {"losses": [1.0] * step, "validation": [[step, loss]], "step": step}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (server.output / "training" / "nothing").mkdir(parents=True)
    there = client.predict(api_name="/workshop_sources")["runs"]
    assert "waves" in there
    assert "nothing" not in there
    for which, step in (("newest", 150), ("best", 100), ("50", 50)):
        made = client.predict("waves", "", which, api_name="/workshop_take")
        assert made["step"] == step
        path = server.folder / "loras" / f"{made['name']}.safetensors"
        assert torch.equal(delta(path), delta(run / f"checkpoint-{step:06}" / "adapter.safetensors"))
    with pytest.raises(AppError, match="no checkpoint '70'"):
        client.predict("waves", "", "70", api_name="/workshop_take")


REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "no such adapter": ("merge", (["nothing"],), "nothing"),
    "an empty stack": ("merge", ([],), "Choose adapters"),
    "no such method": ("merge", (["neon"], "", "sum"), "none of"),
    "a cut for an exact sum": ("merge", (["neon"], "", "concatenate", 0.5, "total", 0, 4), "keeps the ranks"),
    "two cuts": ("resize", ("neon", "", 2, 0.9), "rank and energy"),
    "no cut": ("resize", ("neon",), "To what"),
    "a size that is none": ("resize", ("neon", "", 0, 0.0, -1), "-1 MB"),
    "a path outside": ("resize", ("../../secret",), "not an adapter"),
    "an absolute path": ("convert", ("/etc/passwd", "kohya"), "not an adapter"),
    "a name that is none": ("convert", ("mine/six\0", "kohya"), "not an adapter"),
    "no such layout": ("convert", ("neon", "gguf"), "none of"),
    "a folder of the machine": ("extract", ("/etc", "cogloom-demo"), "not a fine-tuned model"),
    "the base itself": ("extract", ("cogloom-demo", "cogloom-demo"), "base itself"),
    "a base that is not here": ("bake", (["neon"], "THUDM/CogVideoX-5b"), "not a base"),
    "a dtype that is none": ("bake", (["neon"], "cogloom-demo", "", "int4"), "none of"),
    "no such run": ("take", ("../training",), "not a training run"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_said_and_leaves_nothing(client: Client, server: Server, case: str):
    tool, given, said = REFUSED[case]
    before = there(server)
    with pytest.raises(AppError, match=said):
        client.predict(*given, api_name=f"/workshop_{tool}")
    assert there(server) == before


def test_work_that_is_cancelled_leaves_nothing(client: Client, server: Server):
    before = there(server)
    job = client.submit(["neon", "sunset"], "cut short", "ties_svd", api_name="/workshop_merge")
    while not job.outputs() and not job.done():
        pass
    job.cancel()
    # In the same queue: when this is done, the other is over.
    after = client.predict("mine/six.safetensors", "", 1, api_name="/workshop_resize")
    assert there(server) == before | {f"loras/{after['target']}"}


def test_only_what_was_made_here_can_be_fetched(client: Client, server: Server):
    made = client.predict("mine/six.safetensors", "asked for", 1, api_name="/workshop_resize")
    url = made["files"][0]["url"]
    assert httpx.get(server.url + url).status_code == 200
    for other in ("/cogloom/made", "/cogloom/made?file=", "/cogloom/made?file=asked for.safetensors",
                  "/cogloom/made?file=../loras/asked%20for.safetensors", url[:-1]):  # fmt: skip
        assert httpx.get(server.url + other).status_code == 404
    (server.folder / "loras" / "asked for.safetensors").unlink()
    assert httpx.get(server.url + url).status_code == 404


def test_the_record_names_the_parents(client: Client, server: Server):
    made = client.predict(["neon:0.5", "six:1"], "family", api_name="/workshop_merge")
    about = client.predict(made["name"], api_name="/adapter")
    record = json.loads(about["metadata"]["cogloom"])
    assert [(one["name"], one["weight"]) for one in record["parents"]] == [("neon", 0.5), ("six", 1.0)]


# --- the Train tab's checkpoints, and what a training would take ------------------------------------------------------


@pytest.fixture(scope="module")
def toy(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five checkpoints of a real training, each but the first a difference to the one before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    items, run = scan(write_items(tmp_path_factory.mktemp("data"), clips=2)), server.output / "training" / "toy"
    given = settings(steps=5, checkpoint_every=1, validation_every=2, batch_size=1, target_modules=("to_q",))
    train(tiny_base(), items, given, run, tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(threads)
    return run


def test_checkpoints_are_listed_brought_back_and_let_go(client: Client, toy: Path):
    found = client.predict("toy", api_name="/train_checkpoints")
    assert [one["step"] for one in found] == [1, 2, 3, 4, 5]
    assert all(one["loss"] > 0 and not one["problem"] for one in found)
    with whole_state(toy / found[2]["name"]) as path:
        third = path.read_bytes()
    told = client.predict("toy", 3, "third time", api_name="/train_restore")
    again = toy.parent / "third time" / found[2]["name"]
    assert told["run"] == "third time"
    with whole_state(again) as path:
        assert path.read_bytes() == third
    for name, said in (("third time", "already"), ("../outside", "no dots")):
        with pytest.raises(AppError, match=said):
            client.predict("toy", 3, name, api_name="/train_restore")
    foreseen = client.predict("toy", [3, "last"], api_name="/train_prune")
    assert (foreseen["removed"], foreseen["dry_run"]) == ([1, 2, 4], True)
    assert len(client.predict("toy", api_name="/train_checkpoints")) == 5
    done = client.predict("toy", [3, "last"], False, api_name="/train_prune")
    assert (done["kept"], done["after_bytes"]) == ([3, 5], foreseen["after_bytes"])
    assert done["won"] > 0
    with whole_state(toy / found[2]["name"]) as path:
        assert path.read_bytes() == third


@pytest.mark.parametrize("call", [("train_checkpoints", "../loras"), ("train_restore", "nothing", 1),
                                  ("train_prune", "/etc"), ("train_prune", "toy", []), ("train_prune", "toy", [99])],
                         ids=str)  # fmt: skip
def test_runs_elsewhere_are_not_there(client: Client, toy: Path, call: tuple[Any, ...]):
    before = sorted(path.name for path in toy.iterdir())
    with pytest.raises(AppError):
        client.predict(*call[1:], api_name=f"/{call[0]}")
    assert sorted(path.name for path in toy.iterdir()) == before


def test_what_a_training_would_take_is_told_before(client: Client):
    told = client.predict("cogloom-demo", {"frames": 9, "steps": 10}, api_name="/train_estimate")
    assert told["fits"]
    assert 1e6 < sum(told["memory"].values()) <= told["peak"] < told["available"]
    assert told["seconds_per_step"] > 0
    more = client.predict("cogloom-demo", {"frames": 33, "batch_size": 4}, api_name="/train_estimate")
    assert sum(more["memory"].values()) > sum(told["memory"].values())
    with pytest.raises(AppError, match="settings is an object"):
        client.predict("cogloom-demo", {"framez": 9}, api_name="/train_estimate")
