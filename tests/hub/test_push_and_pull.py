"""`jdlora push` and `jdlora pull` against a hub over real HTTP, honest and hostile."""

import json
import shutil
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from tests import tiny_llama
from tests.hub.local_hub import LocalHub
from vllm_jdlora.cli import main
from vllm_jdlora.hub import pull as pulling

huggingface_hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
constants = pytest.importorskip("huggingface_hub.constants")
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three compressed adapters and one that is kept plain."""
    root = tmp_path_factory.mktemp("hub")
    for i in range(3):
        tiny_llama.write_adapter(root / "adapters" / f"a{i}", i, targets=["q_proj"])
    stranger = tiny_llama.write_adapter(root / "stranger", 9, targets=["q_proj"])
    assert main(["compress", str(root / "adapters"), "-o", str(root / "c"), "--rank", "4", "--clusters", "1"]) == 0
    assert main(["add", str(root / "c"), str(stranger), "-o", str(root / "d"), "--max-error", "0.1"]) == 0
    assert (root / "d" / "plain" / "stranger").is_dir()
    return root / "d"


@pytest.fixture
def collection(made, tmp_path):
    return shutil.copytree(made, tmp_path / "c")


@pytest.fixture(autouse=True)
def no_other_host(monkeypatch):
    """Names of other machines are not looked up, and a test that would have fails."""
    resolve, asked = socket.getaddrinfo, []

    def of_this_machine(host, *args, **kwargs):
        if host in ("127.0.0.1", b"127.0.0.1"):
            return resolve(host, *args, **kwargs)
        asked.append(host)
        raise OSError(f"{host}: a test must not reach it")

    monkeypatch.setattr(socket, "getaddrinfo", of_this_machine)
    yield
    assert not asked


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub, known by --endpoint alone: what a call forgets to pass on goes to a port where nobody listens."""
    local = LocalHub()
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", NOBODY + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_local")
    yield local
    local.server.shutdown()
    local.server.server_close()


def push(hub, collection, *more):
    return main(["push", str(collection), "me/them", "--endpoint", hub.url, *more])


def pull(hub, target, *more, repo="me/them"):
    return main(["pull", repo, str(target), "--endpoint", hub.url, *more])


@pytest.fixture
def pushed(hub, collection):
    assert push(hub, collection) == 0
    return hub


def told(capsys) -> str:
    return capsys.readouterr().err


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_pushed_comes_back_byte_for_byte(pushed, collection, tmp_path, capsys):
    assert pushed.commits == 1
    assert set(pushed.files) == {*contents(collection), "README.md"}
    capsys.readouterr()
    assert pull(pushed, tmp_path / "back", "--json") == 0
    assert json.loads(capsys.readouterr().out)["commit"] == pushed.sha
    assert contents(tmp_path / "back") == contents(collection)
    assert not list(tmp_path.glob(".back*"))


def test_the_card_says_how_to_serve_and_has_front_matter_that_yaml_reads(pushed):
    yaml = pytest.importorskip("yaml")
    card = pushed.files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "vllm-jdlora" and front["license"] == "other"
    assert "R = 4, K = 1" in card and "`q_proj`" in card and "jdlora pull me/them" in card and "$" not in card


def test_only_files_of_the_manifest_go_up_and_older_ones_are_deleted(hub, collection):
    hub.files = {"scalings-00009.safetensors": b"old", "figure.png": b"theirs", "README.md": b"# Mine"}
    (collection / "notes.pkl").write_bytes(b"secret")
    assert push(hub, collection) == 0
    assert "notes.pkl" not in hub.files and "scalings-00009.safetensors" not in hub.files
    assert hub.files["figure.png"] == b"theirs" and hub.files["README.md"] == b"# Mine"


def test_a_dry_run_asks_the_hub_nothing(hub, collection, capsys):
    hub.refuse = 500, {}
    assert push(hub, collection, "--dry-run", "--json") == 0
    assert "collection.json" in json.loads(capsys.readouterr().out)["files"]


def test_a_damaged_collection_is_not_pushed(hub, collection, capsys):
    file = collection / "bases.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert push(hub, collection) == 2
    assert not hub.exists and "bases.safetensors" in told(capsys)


def test_names_and_pickles_that_the_manifest_does_not_list_are_never_asked_for(pushed, tmp_path):
    pushed.files |= {"../outside.safetensors": b"x", "model.pkl": b"x", "plain/../../x.json": b"x"}
    assert pull(pushed, tmp_path / "back") == 0
    assert not {"../outside.safetensors", "model.pkl"} & set(pushed.asked)
    assert not (tmp_path / "outside.safetensors").exists()


@pytest.mark.parametrize("name", ["bases.safetensors", "plain/stranger/adapter_model.safetensors"])
@pytest.mark.parametrize("change", [lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: c[:-40], lambda c: b""])
def test_content_that_is_not_what_the_digests_say_does_not_appear(pushed, tmp_path, capsys, change, name):
    pushed.files[name] = change(pushed.files[name])
    assert pull(pushed, tmp_path / "back") == 2
    assert "me/them: is damaged" in told(capsys)
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*"))


def test_a_manifest_that_names_files_elsewhere_is_refused(pushed, tmp_path, capsys):
    raw = json.loads(pushed.files["collection.json"])
    raw["files"]["../../x.safetensors"] = "0" * 64
    pushed.files["collection.json"] = json.dumps(raw).encode()
    assert pull(pushed, tmp_path / "back") == 2
    assert "not a file of a collection" in told(capsys) and not (tmp_path / "back").exists()


REFUSALS = {
    "no repository": ((404, {"X_Error_Code": "RepoNotFound"}), "me/them: is not there, or not for you"),
    "private": ((401, {"X_Error_Code": "RepoNotFound"}), "hf auth login"),
    "gated": ((403, {"X_Error_Code": "GatedRepo"}), "ask for access at http://127.0.0.1"),
    "wrong token": ((401, {"X_Error_Message": "Invalid credentials in Authorization header"}), "look at HF_TOKEN"),
    "no right": ((403, {}), "needs write access to push"),
    "broken": ((400, {}), "me/them: the hub answers"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("command", [push, pull])
def test_a_refusal_is_one_line_that_says_what_to_do(pushed, collection, tmp_path, capsys, command, refusal):
    pushed.refuse, expected = REFUSALS[refusal]
    capsys.readouterr()
    assert command(pushed, collection if command is push else tmp_path / "back") == 2
    said = told(capsys)
    assert said.startswith("jdlora: me/them: ") and expected in said and said.count("\n") == 1
    assert not list(tmp_path.glob("*back*"))


@pytest.mark.parametrize("command", [push, pull])
def test_without_a_network_both_say_so(hub, collection, tmp_path, capsys, command):
    assert command(SimpleNamespace(url=NOBODY), collection if command is push else tmp_path / "back") == 2
    assert "cannot be reached" in told(capsys)


def test_a_branch_that_is_not_there_and_a_name_that_is_none_are_told(pushed, tmp_path, capsys):
    assert pull(pushed, tmp_path / "back", repo="me/them@nowhere") == 2
    assert "no such branch, tag or commit" in told(capsys)
    assert pull(pushed, tmp_path / "back", repo="me/them/../us") == 2
    assert "is not a repository's name" in told(capsys)


def test_a_repository_without_a_collection_is_told(pushed, tmp_path, capsys):
    del pushed.files["collection.json"]
    assert pull(pushed, tmp_path / "back") == 2
    assert "has no collection.json" in told(capsys)


@pytest.mark.parametrize("name", ["bases.safetensors", "scalings-00000.safetensors", "collection.json"])
def test_a_file_that_is_larger_than_the_manifest_can_mean_is_not_downloaded(pushed, tmp_path, capsys, name):
    pushed.sizes[name] = 1 << 40
    assert pull(pushed, tmp_path / "back") == 2
    assert f"{name} is {1 << 40} bytes" in told(capsys)
    assert name not in pushed.asked and not (tmp_path / "back").exists()


def test_what_does_not_fit_on_the_disk_is_not_begun(pushed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    assert pull(pushed, tmp_path / "back") == 2
    assert "make room" in told(capsys) and pushed.asked == []


def test_after_a_download_that_was_cut_only_what_is_missing_is_asked_for(
    pushed, collection, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("time.sleep", lambda _: None)
    cut = "scalings-00000.safetensors"
    pushed.cut_after[cut] = 100
    assert pull(pushed, tmp_path / "back") == 2
    assert "the connection broke" in told(capsys) and not (tmp_path / "back").exists()
    whole = set(pushed.asked) - {cut}
    assert "bases.safetensors" in whole
    pushed.cut_after.clear()
    pushed.asked.clear()
    assert pull(pushed, tmp_path / "back") == 0
    assert cut in pushed.asked and not whole & set(pushed.asked)
    assert contents(tmp_path / "back") == contents(collection)
    assert not list(tmp_path.glob(".back*"))


def test_what_was_left_of_another_commit_is_not_taken(pushed, collection, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    pushed.cut_after["scalings-00000.safetensors"] = 100
    assert pull(pushed, tmp_path / "back") == 2
    pushed.cut_after.clear()
    assert main(["remove", str(collection), "a0", "-o", str(tmp_path / "next")]) == 0
    assert push(pushed, tmp_path / "next") == 0
    assert pull(pushed, tmp_path / "back") == 0
    assert contents(tmp_path / "back") == contents(tmp_path / "next")


def test_what_is_left_of_another_commit_does_not_stand_for_files_that_the_hub_does_not_give(
    pushed, collection, tmp_path, monkeypatch, capsys
):
    """huggingface_hub takes a file that is there for the one that it cannot ask for."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    with monkeypatch.context() as stopped:
        stopped.setattr(pulling, "Collection", SimpleNamespace(open=stop))  # when all has come
        assert pull(pushed, tmp_path / "back") == 130
    assert main(["remove", str(collection), "a0", "-o", str(tmp_path / "next")]) == 0
    assert push(pushed, tmp_path / "next") == 0
    pushed.busy = set(pushed.files)
    capsys.readouterr()
    assert pull(pushed, tmp_path / "back") == 2
    assert "cannot be reached" in told(capsys) and not (tmp_path / "back").exists()
    pushed.busy = set()
    assert pull(pushed, tmp_path / "back") == 0
    assert contents(tmp_path / "back") == contents(tmp_path / "next")


def test_a_pull_that_is_stopped_says_what_is_kept(pushed, tmp_path, monkeypatch, capsys):
    pull_one = huggingface_hub.hf_hub_download
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda r, n, **k: (stop if n[0] == "b" else pull_one)(r, n, **k)
    )
    assert pull(pushed, tmp_path / "back") == 130
    assert "the same command goes on from there" in told(capsys)
    assert [f.name for f in tmp_path.glob("*back*")] == [".back.pull"]


def test_of_two_pulls_to_one_target_at_once_the_second_is_refused(pushed, collection, tmp_path, capsys):
    begun, go_on = threading.Event(), threading.Event()
    pushed.held = "bases.safetensors", begun, go_on
    first: list[int] = []
    thread = threading.Thread(target=lambda: first.append(pull(pushed, tmp_path / "back")))
    thread.start()
    try:
        assert begun.wait(10)
        assert pull(pushed, tmp_path / "back") == 2
        assert "another process is pulling to it" in told(capsys)
    finally:
        go_on.set()
        thread.join()
    assert first == [0] and contents(tmp_path / "back") == contents(collection)


def test_of_two_pushes_at_once_the_second_is_refused(hub, collection, capsys):
    hub.exists, hub.other_push = True, True
    assert push(hub, collection) == 2
    assert "another commit meanwhile" in told(capsys) and not hub.files


@pytest.mark.parametrize("uploads", [1, 4])
def test_a_collection_that_is_replaced_while_it_is_uploaded_is_not_committed(hub, collection, capsys, uploads):
    """`jdlora remove` and the like put another folder in its place, whose files have other bytes by the same names."""
    replaced: list[int] = []

    def replace():
        if len(hub.blobs) == uploads and not replaced:
            replaced.append(main(["remove", str(collection), "a0"]))

    hub.on_upload = replace
    assert push(hub, collection) == 2
    assert replaced == [0] and "was replaced while it was pushed; push again" in told(capsys)
    assert not hub.files
    assert push(hub, collection) == 0
    assert {name: hub.files[name] for name in contents(collection)} == contents(collection)


def test_a_file_that_is_written_over_after_the_check_is_not_committed(hub, collection, capsys):
    hub.on_create = lambda: (collection / "bases.safetensors").write_bytes(b"other")
    assert push(hub, collection) == 2
    assert "bases.safetensors: was changed while it was pushed" in told(capsys) and not hub.files


def test_pushing_what_is_there_makes_no_commit_and_a_branch_can_be_named(pushed, collection, tmp_path):
    assert push(pushed, collection, "--branch", "tried") == 0
    assert pushed.commits == 1
    assert pull(pushed, tmp_path / "back", repo="me/them@tried") == 0


def test_a_folder_that_holds_other_things_is_never_replaced(pushed, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("mine")
    assert pull(pushed, tmp_path / "home", "--force") == 2
    assert "it is not replaced" in told(capsys) and "bases.safetensors" not in pushed.asked


def test_a_target_with_other_content_is_kept_without_force(pushed, tmp_path, capsys):
    back = tmp_path / "back"
    assert pull(pushed, back) == 0
    assert pull(pushed, back) == 0, "the same revision"
    (back / "bases.safetensors").write_bytes(b"damaged")
    assert pull(pushed, back) == 2
    assert "--force" in told(capsys)
    assert pull(pushed, back, "--force") == 0
    assert main(["validate", str(back)]) == 0


def test_the_command_line_does_not_import_huggingface_hub():
    modules = "sys, vllm_jdlora.cli, vllm_jdlora.hub.push, vllm_jdlora.hub.pull"
    code = f"import {modules}; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
