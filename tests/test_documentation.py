"""What the documents say can be done: links lead somewhere, and commands, flags, targets and files exist."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from vllm_jdlora import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/README.md"), ROOT / "docker/README.md"]
)
BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[\w+\]: (\S+)", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
EVERYWHERE = {"--help", "--version"}


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def commands_in(document: Path) -> list[str]:
    """What stands in code, a command each: continued lines are joined, and comments dropped."""
    text = document.read_text()
    blocks = "\n".join(BLOCK.findall(text)).replace("\\\n", " ")
    lines = [line.lstrip("$ ").partition("  #")[0] for line in blocks.splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]
    return lines + spans


def anchors_of(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings_that_there_are(document):
    for link in (a or b for a, b in LINK.findall(BLOCK.sub("", document.read_text()))):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def subcommands() -> dict[str, argparse.ArgumentParser]:
    [action] = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_jdlora_has_the_commands_and_flags_that_documents_give(document):
    known = subcommands()
    for command in commands_in(document):
        for name, rest in re.findall(r"(?<![\w-])jdlora ([a-z][a-z-]*)\b([^|;&]*)", command):
            if name in ("event",):  # a log line
                continue
            assert name in known, command
            flags = set(known[name]._option_string_actions) | EVERYWHERE
            assert set(FLAG.findall(rest)) <= flags, command


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_vllm_has_the_flags_of_this_package_that_documents_give(document):
    pytest.importorskip("vllm")
    from vllm_jdlora.serving.flags import add_flags

    known = set(add_flags(argparse.ArgumentParser())._option_string_actions)
    own = [flag for flag in FLAG.findall(document.read_text()) if flag.startswith(("--jd-", "--lora-co"))]
    assert set(own) <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_make_has_the_targets_that_documents_give(document):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands_in(document):
        if found := re.match(r"make ([a-z0-9-]+)", command):
            assert found[1] in targets, command


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_modules_that_documents_name_exist(document):
    files = {
        str(path.relative_to(ROOT))
        for part in ("vllm_jdlora", "kernels", "loadtests", "tests")
        for path in ROOT.glob(f"{part}/**/*.py")
    }
    for span in re.findall(r"`([^`\s]+\.py)`", document.read_text()):
        pattern = re.compile(r"(?:^|.*/)" + re.escape(span).replace(r"\*", "[^/]*"))
        assert any(pattern.fullmatch(file) for file in files), span
